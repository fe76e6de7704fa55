package librbd_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestTable: the table of docs/librbd.md has each function of the library, and says whether it
// does something.
func TestTable(t *testing.T) {
	files, err := filepath.Glob("../../librbd/*.c")
	if err != nil || len(files) < 5 {
		t.Fatalf("the library's sources: %v, %v", files, err)
	}
	stub := regexp.MustCompile(`(?m)^STUB\((rbd_\w+)\)`)
	defined := regexp.MustCompile(`(?m)^(?:EXPORT )?[a-z_0-9]+ \*?(rbd_\w+)\([^;{]*\)\s*\{`)
	var want []string
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range stub.FindAllStringSubmatch(string(text), -1) {
			want = append(want, m[1]+" no")
		}
		for _, m := range defined.FindAllStringSubmatch(string(text), -1) {
			want = append(want, m[1]+" yes")
		}
	}
	doc, err := os.ReadFile("../../docs/librbd.md")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(rbd_\\w+)` \\| (yes|no) \\|").FindAllStringSubmatch(string(doc), -1) {
		got = append(got, m[1]+" "+m[2])
	}
	if !slices.IsSorted(got) {
		t.Error("the table is not in the order of names")
	}
	slices.Sort(want)
	for _, s := range slices.Concat(missing(want, got, "is missing in the table"), missing(got, want, "is not in the library")) {
		t.Error(s)
	}
	if !strings.Contains(string(doc), fmt.Sprintf("are there, %d functions", len(got))) && !strings.Contains(string(doc), fmt.Sprintf("is there, %d functions", len(got))) {
		t.Errorf("the text does not say that there are %d functions", len(got))
	}
}

// missing says which of list others has not.
func missing(list, others []string, what string) (said []string) {
	for _, s := range list {
		if !slices.Contains(others, s) {
			said = append(said, s+" "+what)
		}
	}
	return said
}
