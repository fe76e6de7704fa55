package lab

import (
	"maps"
	"strings"
	"testing"
)

func TestParsePerf(t *testing.T) {
	for _, x := range []struct {
		name, text string
		want       map[string]float64 // nil: an error
	}{
		{"a virtual machine", "# started on Sun Nov 29 17:19:51 2026\n\n<not supported>,,instructions:u,0,100.00,,\n29,,raw_syscalls:sys_enter,756037,100.00,,\n8,,context-switches,756037,100.00,,\n",
			map[string]float64{"raw_syscalls:sys_enter": 29, "context-switches": 8}},
		{"a machine", "123456,,instructions:u,756037,100.00,0.5,insn per cycle\n", map[string]float64{"instructions:u": 123456}},
		{"not counted", "<not counted>,,instructions:u,0,0.00,,\n", nil},
		{"nothing", "", nil},
		{"nonsense", "a,b,c\n", nil},
	} {
		got, err := parsePerf(strings.NewReader(x.text))
		if (err != nil) != (x.want == nil) || err == nil && !maps.Equal(got, x.want) {
			t.Errorf("%s: %v, %v; want %v", x.name, got, err, x.want)
		}
	}
}
