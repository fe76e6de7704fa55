package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/lsd-ceph/lsd/tests/bench/lab"
)

// accounts is how many rows a database has in the beginning.
const accounts = 10000

// makeDatabase makes a bank's database.
func makeDatabase(ctx context.Context, h *lab.Host, path, journalMode string) error {
	_, err := h.Run(ctx, "sqlite3", "-batch", "-bail", path, fmt.Sprintf(`
		PRAGMA journal_mode=%s;
		CREATE TABLE accounts(id INTEGER PRIMARY KEY, balance INTEGER NOT NULL, owner TEXT NOT NULL);
		CREATE TABLE history(id INTEGER PRIMARY KEY, account INTEGER NOT NULL, amount INTEGER NOT NULL, note TEXT NOT NULL);
		WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < %d)
		INSERT INTO accounts SELECT i, 0, hex(randomblob(40)) FROM n;`, journalMode, accounts))
	return err
}

// transactions has the sqlite3 program book amounts for some time, one transaction after the
// other, with synchronous=FULL: each is on stable storage when it answers.
func transactions(ctx context.Context, h *lab.Host, path string, length time.Duration) (lab.Figures, error) {
	s, err := openSQLite(ctx, h, path)
	if err != nil {
		return nil, err
	}
	took, total, err := s.book(length)
	if err2 := s.end(); err == nil {
		err = err2
	}
	if err != nil {
		return nil, fmt.Errorf("SQLite on %s: %w", path, err)
	}
	return lab.Figures{"ops/s": float64(len(took)) / total.Seconds(), "p99 ms": ms(percentile(took, 0.99))}, nil
}

// sqlite is a running sqlite3.
type sqlite struct {
	in     io.WriteCloser
	out    *bufio.Scanner
	said   *strings.Builder
	waited func() error
}

func openSQLite(ctx context.Context, h *lab.Host, path string) (*sqlite, error) {
	cmd := h.Command(ctx, "sqlite3", "-batch", "-bail", path)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s := &sqlite{in: in, out: bufio.NewScanner(out), said: new(strings.Builder), waited: cmd.Wait}
	cmd.Stderr = s.said
	return s, cmd.Start()
}

// ask sends statements, of which one answers with a line.
func (s *sqlite) ask(statements string) (string, error) {
	if _, err := io.WriteString(s.in, statements+"\n"); err != nil {
		return "", err
	}
	if !s.out.Scan() {
		return "", errors.Join(errors.New("it has ended"), s.out.Err())
	}
	return s.out.Text(), nil
}

// count returns how many bookings there are.
func (s *sqlite) count() (int, error) {
	text, err := s.ask("SELECT count(*) FROM history;")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

// book does transactions and returns how long each took, and all of them.
func (s *sqlite) book(length time.Duration) (took []time.Duration, total time.Duration, err error) {
	if _, err := io.WriteString(s.in, "PRAGMA synchronous=FULL;\n"); err != nil {
		return nil, 0, err
	}
	before, err := s.count()
	if err != nil {
		return nil, 0, err
	}
	began := time.Now()
	for total < length {
		account, amount := 1+rand.IntN(accounts), rand.IntN(1000)
		if _, err := s.ask(fmt.Sprintf("BEGIN; UPDATE accounts SET balance=balance+%d WHERE id=%d; "+
			"INSERT INTO history(account, amount, note) VALUES(%[2]d, %[1]d, hex(randomblob(50))); COMMIT; SELECT 'done';", amount, account)); err != nil {
			return nil, 0, err
		}
		now := time.Since(began)
		took = append(took, now-total)
		total = now
	}
	after, err := s.count()
	if err == nil && after-before != len(took) {
		err = fmt.Errorf("%d transactions have made %d bookings", len(took), after-before)
	}
	return took, total, err
}

// end ends the program.
func (s *sqlite) end() error {
	s.in.Close()
	for s.out.Scan() {
	}
	if err := s.waited(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(s.said.String()))
	}
	return nil
}
