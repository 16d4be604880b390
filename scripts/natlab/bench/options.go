package main

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	verbCompare = "compare"
	verbLoss    = "loss"
	verbPaths   = "paths"
	verbProfile = "profile"
	verbSoak    = "soak"
	verbRelay   = "relay"
	verbNAT     = "nat"
	// verbPing and verbPour are for the copy of this program that runs inside
	// a host of the lab.
	verbPing = "ping"
	verbPour = "pour"

	defaultPairs   = 5
	defaultSeconds = 10
	quickPairs     = 1
	quickSeconds   = 2
	maxPairs       = 100
	maxSeconds     = 600
	defaultMTU     = 1400
	defaultMinutes = 30
	minMinutes     = 0.2
	maxMinutes     = 90
	minMbps        = 10 // less comes in bursts, with seconds of nothing between
	maxMbps        = 100_000
)

// The variants of a tunnel that are compared.
const (
	variantRaw     = "raw"     // wireguard-go
	variantControl = "control" // wireguard-go once more
	variantPlain   = "plain"   // the overlay without large messages
	variantOverlay = "overlay" // the overlay as it comes
)

// options are the command line.
type options struct {
	verb               string
	overlay, wireguard string
	mtu, pairs         int
	seconds            int
	quick, markdown    bool
	variants, only     list
	settings           list // loss
	cells              list // nat
	runs               int  // nat; 0: as many as the kind of cell wants
	json               string

	variant, out string  // profile, soak
	minutes      float64 // soak
	mbps         int     // soak

	to          string // ping, pour
	every, wait time.Duration
}

// list is a flag of names with commas between.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(text string) error {
	*l = strings.Split(text, ",")
	return nil
}

func parseOptions(args []string) (*options, error) {
	o := &options{verb: verbCompare, variants: list{variantRaw, variantPlain, variantOverlay}}
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		o.verb, args = args[0], args[1:]
	}
	if verbs()[o.verb] == nil {
		return nil, fmt.Errorf("unknown verb %q; there are %s, %s, %s, %s, %s, %s and %s", o.verb,
			verbCompare, verbLoss, verbPaths, verbRelay, verbNAT, verbProfile, verbSoak)
	}
	if o.verb == verbRelay {
		o.variants = relayVariants()
	}
	f := o.flags()
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	if o.quick {
		o.pairs, o.seconds, o.minutes, o.runs = quickPairs, quickSeconds, minMinutes, 1
	}
	return o, o.check()
}

// flags are those that mean something to the verb.
func (o *options) flags() *flag.FlagSet {
	f := flag.NewFlagSet("bench "+o.verb, flag.ContinueOnError)
	if o.verb == verbPing || o.verb == verbPour {
		f.StringVar(&o.to, "to", "", "`address` to send to")
		f.DurationVar(&o.wait, "for", time.Second, "how long to send")
		if o.verb == verbPing {
			f.DurationVar(&o.every, "every", pingEvery, "time between two pings")
		} else {
			f.IntVar(&o.mbps, "mbps", minMbps, "pace in Mbit/s")
		}
		// They have no meaning here, and are what check wants.
		o.pairs, o.seconds, o.minutes = quickPairs, quickSeconds, defaultMinutes
		return f
	}
	f.StringVar(&o.overlay, "overlay", "", "ready overlay program; empty compiles it")
	f.StringVar(&o.wireguard, "wireguard", "wireguard-go", "ready wireguard-go program")
	f.IntVar(&o.mtu, "mtu", defaultMTU, "MTU of all tunnels")
	f.StringVar(&o.json, "json", "", "write all figures to this `file`, too")
	f.BoolVar(&o.quick, "quick", false, "as short as can be: shows that it works, proves no figure")
	o.pairs, o.minutes, o.seconds = defaultPairs, defaultMinutes, defaultSeconds
	if o.verb == verbNAT {
		f.IntVar(&o.runs, "runs", 0, fmt.Sprintf("runs of each cell; 0 is %d of easy and %d of hard ones", easyRuns, hardRuns))
		f.Var(&o.cells, "cells", "only these cells or groups, or with this in their name")
		return f
	}
	if o.verb != verbSoak {
		f.IntVar(&o.seconds, "seconds", defaultSeconds, "length of each measurement")
	}
	switch o.verb {
	case verbProfile:
		f.StringVar(&o.variant, "variant", variantOverlay, "raw, plain or overlay")
		f.StringVar(&o.out, "out", "", "`folder` for the profiles and the table; empty keeps the table only on the screen")
	case verbSoak:
		f.StringVar(&o.variant, "variant", variantOverlay, "raw, plain or overlay")
		f.Float64Var(&o.minutes, "minutes", defaultMinutes, "how long")
		f.IntVar(&o.mbps, "mbps", 0, "pace of the TCP stream in Mbit/s, so that other work can run beside; 0 is none")
	default:
		f.IntVar(&o.pairs, "pairs", defaultPairs, "interleaved rounds of measurements")
		f.Var(&o.variants, "variants", "what to compare, of "+strings.Join(variantsOf(o.verb), ", "))
		f.Var(&o.only, "only", "only these cases, of "+strings.Join(known(o.verb), ", "))
		if o.verb == verbLoss {
			f.Var(&o.settings, "settings", "only these settings of the line, of "+strings.Join(settingNames(), ", "))
		}
		f.BoolVar(&o.markdown, "markdown", false, "print the table as Markdown")
		if o.verb != verbRelay {
			f.BoolFunc("control", "compare raw with raw: the noise of this machine", func(string) error {
				o.variants = list{variantRaw, variantControl}
				return nil
			})
		}
	}
	return f
}

// variantsOf are what a verb can compare.
func variantsOf(verb string) list {
	if verb == verbRelay {
		return relayVariants()
	}
	return list{variantRaw, variantControl, variantPlain, variantOverlay}
}

func (o *options) check() error {
	if o.pairs < 1 || o.pairs > maxPairs || o.seconds < quickSeconds || o.seconds > maxSeconds {
		return fmt.Errorf("pairs must be 1 to %d, seconds %d to %d", maxPairs, quickSeconds, maxSeconds)
	}
	if o.minutes < minMinutes || o.minutes > maxMinutes {
		return fmt.Errorf("minutes must be %v to %v", minMinutes, maxMinutes)
	}
	if o.mbps != 0 && (o.mbps < minMbps || o.mbps > maxMbps) {
		return fmt.Errorf("mbps must be 0, for no pace, or %d to %d", minMbps, maxMbps)
	}
	if o.runs < 0 || o.runs > maxRuns {
		return fmt.Errorf("runs must be 0 to %d", maxRuns)
	}
	all := variantsOf(o.verb)
	for i, v := range o.variants {
		if !slices.Contains(all, v) || slices.Contains(o.variants[:i], v) {
			return fmt.Errorf("variant %q is unknown or named twice; there are %s", v, strings.Join(all, ", "))
		}
	}
	if o.variant == variantControl || o.variant != "" && !slices.Contains(all, o.variant) {
		return fmt.Errorf("variant %q is unknown; there are raw, plain and overlay", o.variant)
	}
	for _, name := range o.only {
		if cases := known(o.verb); !slices.Contains(cases, name) {
			return fmt.Errorf("there is no case %q; there are %s", name, strings.Join(cases, ", "))
		}
	}
	for _, name := range o.settings {
		if !slices.Contains(settingNames(), name) {
			return fmt.Errorf("there is no setting %q; there are %s", name, strings.Join(settingNames(), ", "))
		}
	}
	if o.verb == verbPing && (o.every <= 0 || o.wait/o.every > maxPings) {
		return errors.New("that is no pace, or too many pings")
	}
	return nil
}
