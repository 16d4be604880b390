package main

import (
	"bytes"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"time"

	"overlay/scripts/natlab"
)

// screen is what the person watching sees: numbered steps, command lines as
// they are typed, and what the commands print, indented.
type screen struct {
	mu     sync.Mutex
	out    io.Writer
	steps  int
	inLine bool
}

// step begins the next step of the demo.
func (s *screen) step(format string, args ...any) {
	s.steps++
	s.say(fmt.Sprintf("%d. ", s.steps)+format, args...)
}

func (s *screen) say(format string, args ...any) {
	fmt.Fprintf(s.out, "\n"+format+"\n", args...)
}

func (s *screen) typed(host *natlab.Host, args ...string) {
	words := make([]string, len(args))
	for i, a := range args {
		words[i] = a
		if strings.ContainsAny(a, " ;$") {
			words[i] = "'" + a + "'"
		}
	}
	fmt.Fprintf(s.out, "   %s$ %s\n", host.Name(), strings.Join(words, " "))
}

// Write prints what a command prints; both its streams come here.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for line := range bytes.Lines(p) {
		if !s.inLine {
			io.WriteString(s.out, "   | ")
		}
		if _, err := s.out.Write(line); err != nil {
			return 0, fmt.Errorf("write to screen: %w", err)
		}
		s.inLine = !bytes.HasSuffix(line, []byte("\n"))
	}
	return len(p), nil
}

// run shows a command, runs it, and gives its standard output.
func (s *screen) run(host *natlab.Host, cmd *exec.Cmd, args ...string) (string, error) {
	s.typed(host, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, s), s
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s on %s: %w", strings.Join(args, " "), host.Name(), err)
	}
	fmt.Fprintf(s.out, "   (%.2f s)\n", time.Since(start).Seconds())
	return out.String(), nil
}
