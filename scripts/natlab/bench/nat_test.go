package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"overlay/scripts/natlab"
)

func TestChosenCells(t *testing.T) {
	for names, want := range map[string]bool{"": true, "random-random": true, "random × random": true, "easy": false} {
		var l list
		if names != "" {
			l = list{names}
		}
		for _, c := range natlab.Cells() {
			if c.Group == "random-random" && chosen(c, l) != want {
				t.Errorf("%q chooses %s: %v", names, c.Name(), !want)
			}
		}
	}
}

func TestMatrixLine(t *testing.T) {
	c := natlab.Cells()[0]
	good := natlab.Run{Connected: true, Direct: true, After: 120 * time.Millisecond, Via: "srflx", Spent: 7, Routers: natlab.Tracked{All: 9, Search: 2, Ports: 1}}
	bad := natlab.Run{Connected: true, After: 4 * time.Second, Via: "relay-udp", Spent: 70, Routers: natlab.Tracked{All: 12, Search: 1, Ports: 3}}
	table := cellTable{Cell: c.Name(), Bar: c.Bar, Runs: []natlab.Run{good, bad}}
	table.outcome = natlab.Outcome{Cell: c, Runs: table.Runs}
	var text bytes.Buffer
	markdown(&text, [][]string{table.line()})
	for _, part := range []string{"| 2 | 2/2 | 1/2 | 0.12 | 0.12 | 7, at most 70 | 2 of 40, 12 with servers | srflx, relay-udp | 100 % ≤ 1.5s, median ≤ 500ms | no |"} {
		if !strings.Contains(text.String(), part) {
			t.Errorf("%s lacks %s", text.String(), part)
		}
	}
	table.Error = "no lab"
	if line := table.line(); line[len(line)-1] != "failed" {
		t.Error(line)
	}
}
