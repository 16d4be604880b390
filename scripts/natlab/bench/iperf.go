package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"overlay/scripts/natlab"
)

const (
	iperfGrace = 20 * time.Second
	busyTries  = 5
	busyPause  = 300 * time.Millisecond
	gigabyte   = 1e9
)

// stream is what iperf3 is told of a measurement, whatever it measures. One of
// 0 seconds ends by something else.
type stream struct {
	host     *natlab.Host
	from, to netip.Addr
	port     int
	seconds  int
}

// stream goes from the first host of a tunnel to one of its peers.
func (b *bench) stream(t *tunnel, peer int) stream {
	return stream{host: t.hosts[0], from: t.addrs[0], to: t.addrs[peer], port: iperfPort, seconds: b.opts.seconds}
}

// iperfResult is the part of what `iperf3 -J` prints that is used here.
type iperfResult struct {
	Intervals []struct {
		Sum struct {
			Start float64 `json:"start"`
			Bytes float64 `json:"bytes"`
		} `json:"sum"`
	} `json:"intervals"`
	End struct {
		// Sum is of UDP, as the receiver counted it.
		Sum struct {
			Seconds     float64 `json:"seconds"`
			Packets     float64 `json:"packets"`
			LostPackets float64 `json:"lost_packets"`
		} `json:"sum"`
		SumSent     iperfSum `json:"sum_sent"`
		SumReceived iperfSum `json:"sum_received"`
		// The other direction of a measurement of both.
		BackSent     iperfSum `json:"sum_sent_bidir_reverse"`
		BackReceived iperfSum `json:"sum_received_bidir_reverse"`
	} `json:"end"`
}

type iperfSum struct {
	Bytes         float64 `json:"bytes"`
	BitsPerSecond float64 `json:"bits_per_second"`
	Retransmits   float64 `json:"retransmits"`
}

// iperf runs one measurement. A server that is not done with the one before
// is asked again.
func (s stream) iperf(ctx context.Context, args ...string) (iperfResult, error) {
	var r iperfResult
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.seconds)*time.Second+iperfGrace)
	defer cancel()
	args = append([]string{
		"-J", "-c", s.to.String(), "-B", s.from.String(), "-p", fmt.Sprint(s.port),
	}, args...)
	if s.seconds > 0 {
		args = append(args, "-t", fmt.Sprint(s.seconds))
	}
	var out string
	for try := range busyTries {
		var err error
		out, err = output(s.host.Command(ctx, "iperf3", args...))
		if err == nil {
			break
		}
		if try == busyTries-1 || !strings.Contains(err.Error(), "server is busy") {
			return r, err
		}
		time.Sleep(busyPause)
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return r, fmt.Errorf("read output of iperf3: %w", err)
	}
	return r, nil
}

// arrived is the share of packets lost, in percent, and the packets received.
func (r iperfResult) arrived() (lost, packets float64, err error) {
	sum := r.End.Sum
	if sum.Packets <= 0 || sum.Seconds <= 0 {
		return 0, 0, fmt.Errorf("iperf3 says that %.0f packets were sent in %.1f s", sum.Packets, sum.Seconds)
	}
	return 100 * sum.LostPackets / sum.Packets, sum.Packets - sum.LostPackets, nil
}
