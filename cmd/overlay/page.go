package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// page is plain text in aligned columns. Rows that follow each other are aligned
// together.
type page struct {
	text  strings.Builder
	table *tabwriter.Writer
}

func (p *page) line(format string, args ...any) {
	p.flush()
	p.text.WriteString(clean(fmt.Sprintf(format, args...)) + "\n")
}

func (p *page) gap() {
	p.flush()
	p.text.WriteString("\n")
}

func (p *page) row(cells ...string) {
	if p.table == nil {
		p.table = tabwriter.NewWriter(&p.text, 0, 0, 2, ' ', 0)
	}
	for i, cell := range cells {
		if i > 0 {
			fmt.Fprint(p.table, "\t")
		}
		fmt.Fprint(p.table, cleanCell(cell))
	}
	fmt.Fprintln(p.table)
}

// cleanCell is clean that keeps the indentation.
func cleanCell(cell string) string { return strings.TrimRight(clean(cell), " ") }

func (p *page) flush() {
	if p.table != nil {
		_ = p.table.Flush() // into memory
		p.table = nil
	}
}

func (p *page) facts(list [][2]string) {
	for _, f := range list {
		p.row(f[0], f[1])
	}
	p.flush()
}

// help lists what would help.
func (p *page) help(list []string) {
	if len(list) == 0 {
		return
	}
	p.gap()
	p.line("what would help")
	for _, h := range list {
		p.line("  - %s", h)
	}
}

func (p *page) print(out io.Writer) error {
	p.flush()
	if _, err := io.WriteString(out, p.text.String()); err != nil {
		return fmt.Errorf("write the output: %w", err)
	}
	return nil
}
