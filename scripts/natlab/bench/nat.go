package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"overlay/scripts/natlab"
)

const (
	easyRuns = 20
	hardRuns = 30
	maxRuns  = 1000
)

// matrix is what the verb nat says.
type matrix struct {
	Schema  int         `json:"schema"`
	Time    time.Time   `json:"time"`
	Machine string      `json:"machine"`
	Cells   []cellTable `json:"cells"`
}

// cellTable is a cell with all of its runs.
type cellTable struct {
	Group   string       `json:"group"`
	Cell    string       `json:"cell"`
	Bar     natlab.Bar   `json:"bar"`
	Reached bool         `json:"reached"`
	Runs    []natlab.Run `json:"runs"`
	Error   string       `json:"error,omitempty"`

	outcome natlab.Outcome
}

// measureNATs connects two laptops behind every chosen pair of NATs again and
// again, and prints the matrix.
func measureNATs(ctx context.Context, o *options) error {
	m := &matrix{Schema: 1, Time: time.Now(), Machine: machine()}
	var failed error
	for _, c := range natlab.Cells() {
		if !chosen(c, o.cells) {
			continue
		}
		t := measureCell(ctx, o, c)
		if ctx.Err() != nil {
			failed = ctx.Err()
			break
		}
		m.Cells = append(m.Cells, t)
	}
	if len(m.Cells) == 0 && failed == nil {
		return fmt.Errorf("no cell is called %s", o.cells.String())
	}
	return errors.Join(failed, m.print(), save(m, o.json))
}

// chosen says that a cell, or its group, was asked for; nothing asks for all.
func chosen(c natlab.Cell, names list) bool {
	for _, n := range names {
		if n == c.Group || strings.Contains(c.Name(), n) {
			return true
		}
	}
	return len(names) == 0
}

// measureCell does the runs of a cell in a lab of its own. What goes wrong with
// the lab is told in the table.
func measureCell(ctx context.Context, o *options, c natlab.Cell) cellTable {
	t := cellTable{Group: c.Group, Cell: c.Name(), Bar: c.Bar, outcome: natlab.Outcome{Cell: c}}
	fmt.Fprintf(os.Stderr, "%s\n", t.Cell)
	if err := t.run(ctx, o); err != nil {
		t.Error = err.Error()
		fmt.Fprintf(os.Stderr, "  %v\n", err)
	}
	t.Runs = t.outcome.Runs
	t.Reached = t.Error == "" && t.outcome.Reached()
	return t
}

func (t *cellTable) run(ctx context.Context, o *options) (err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	p, err := t.outcome.Cell.Build(ctx, natlab.Options{Binary: o.overlay, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close()) }()
	for i := range t.count(o) {
		r, err := p.Run(ctx, i)
		if err != nil {
			return err
		}
		t.outcome.Runs = append(t.outcome.Runs, r)
		fmt.Fprintf(os.Stderr, "  %d: direct %v after %v, by %s, %d packets, %+v in a router, %d fit\n",
			i, r.Direct, r.After.Round(time.Millisecond), r.Via, r.Spent, r.Routers, r.Fits)
	}
	return nil
}

// count is how many runs a cell gets.
func (t *cellTable) count(o *options) int {
	switch {
	case o.runs > 0:
		return o.runs
	case t.Bar.Share < 1 && !t.Bar.Relay:
		return hardRuns
	}
	return easyRuns
}

func (m *matrix) print() error {
	var text bytes.Buffer
	fmt.Fprintf(&text, "\n%s; times from the first packet on, in seconds\n\n", m.Machine)
	cells := [][]string{{"cell", "runs", "connected", "direct", "median", "worst", "packets spent", "router entries, peak", "by", "bar", "reached"}}
	for _, t := range m.Cells {
		cells = append(cells, t.line())
	}
	markdown(&text, cells)
	if _, err := os.Stdout.Write(text.Bytes()); err != nil {
		return fmt.Errorf("print table: %w", err)
	}
	return nil
}

func (t *cellTable) line() []string {
	o, n := t.outcome, len(t.Runs)
	median, worst := o.After()
	spent, most := o.Spent()
	of := func(k int) string { return fmt.Sprintf("%d/%d", k, n) }
	times := []string{"–", "–"}
	if o.Direct() > 0 {
		times = []string{fmt.Sprintf("%.2f", median.Seconds()), fmt.Sprintf("%.2f", worst.Seconds())}
	}
	reached := "no"
	switch {
	case t.Error != "":
		reached = "failed"
	case t.Reached:
		reached = "yes"
	}
	return []string{
		t.Cell, fmt.Sprint(n), of(o.Connected()), of(o.Direct()), times[0], times[1], fmt.Sprintf("%d, at most %d", spent, most),
		entriesText(o.Routers(), t.outcome.Cell.Limit()), strings.Join(o.Via(), ", "), barText(t.Bar), reached,
	}
}

// entriesText is how many flows a router had for the search, of how many it may, and
// how many of all.
func entriesText(t, limit natlab.Tracked) string {
	return fmt.Sprintf("%d of %d, %d with servers", t.Search, limit.Search, t.All)
}

func barText(b natlab.Bar) string {
	if b.Relay {
		return "relay"
	}
	text := fmt.Sprintf("%.0f %% ≤ %v", 100*b.Share, b.Worst)
	if b.Median > 0 {
		text += fmt.Sprintf(", median ≤ %v", b.Median)
	}
	return text
}
