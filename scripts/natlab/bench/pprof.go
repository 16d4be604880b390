package main

import (
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// errProfile says that a file is no CPU profile of Go.
var errProfile = errors.New("this is no CPU profile of Go")

// stack is where a profile found a program, innermost first, and for how many
// nanoseconds.
type stack struct {
	frames []frame
	nanos  int64
}

type frame struct{ function, file string }

// The fields of profile.proto of pprof that are used here.
const (
	profileSample, profileLocation, profileFunction, profileStrings = 2, 4, 5, 6

	sampleLocations, sampleValues = 1, 2
	locationID, locationLine      = 1, 4
	lineFunction                  = 1
	functionID, functionName      = 1, 2
	functionFile                  = 4

	// cpuValue is the second value of a sample; the first is a count.
	cpuValue = 1

	maxProfile = 64 << 20
)

// message is one protobuf message, as far as it is not read yet.
type message []byte

// field takes the next field: its number, and its value, either a number or
// bytes.
func (m *message) field() (number int, value uint64, bytes message, err error) {
	const varint, fixed64, length, fixed32 = 0, 1, 2, 5
	key, err := m.varint()
	if err != nil {
		return 0, 0, nil, err
	}
	size := uint64(0)
	switch key & 7 {
	case varint:
		value, err = m.varint()
		return int(key >> 3), value, nil, err
	case fixed64:
		size = 8
	case fixed32:
		size = 4
	case length:
		if size, err = m.varint(); err != nil {
			return 0, 0, nil, err
		}
	default:
		return 0, 0, nil, errProfile
	}
	if size > uint64(len(*m)) {
		return 0, 0, nil, errProfile
	}
	bytes, *m = (*m)[:size], (*m)[size:]
	return int(key >> 3), 0, bytes, nil
}

func (m *message) varint() (uint64, error) {
	value, n := binary.Uvarint(*m)
	if n <= 0 {
		return 0, errProfile
	}
	*m = (*m)[n:]
	return value, nil
}

// each calls f for every field.
func (m message) each(f func(number int, value uint64, bytes message) error) error {
	for len(m) > 0 {
		number, value, bytes, err := m.field()
		if err != nil {
			return err
		}
		if err := f(number, value, bytes); err != nil {
			return err
		}
	}
	return nil
}

// numbers reads a repeated number, which may be packed or not.
func numbers(all []uint64, value uint64, bytes message) ([]uint64, error) {
	if bytes == nil {
		return append(all, value), nil
	}
	for len(bytes) > 0 {
		n, err := bytes.varint()
		if err != nil {
			return nil, err
		}
		all = append(all, n)
	}
	return all, nil
}

// symbols are the parts of a profile that samples refer to.
type symbols struct {
	text      []string
	functions map[uint64]function
	locations map[uint64][]uint64 // functions, the innermost inlined one first
}

type function struct{ name, file uint64 }

// readProfile reads a CPU profile as runtime/pprof writes it.
func readProfile(from io.Reader) ([]stack, error) {
	unzipped, err := gzip.NewReader(from)
	if err != nil {
		return nil, fmt.Errorf("unpack profile: %w", err)
	}
	all, err := io.ReadAll(io.LimitReader(unzipped, maxProfile))
	if err != nil {
		return nil, fmt.Errorf("unpack profile: %w", err)
	}
	known := &symbols{functions: map[uint64]function{}, locations: map[uint64][]uint64{}}
	var samples []message
	err = message(all).each(func(number int, _ uint64, bytes message) (err error) {
		switch number {
		case profileSample:
			samples = append(samples, bytes)
		case profileLocation:
			err = known.location(bytes)
		case profileFunction:
			err = known.function(bytes)
		case profileStrings:
			known.text = append(known.text, string(bytes))
		}
		return err
	})
	var stacks []stack
	for _, m := range samples {
		s, e := known.sample(m)
		err = errors.Join(err, e)
		stacks = append(stacks, s)
	}
	return stacks, err
}

func (k *symbols) location(m message) error {
	var id uint64
	var functions []uint64
	err := m.each(func(number int, value uint64, bytes message) error {
		switch number {
		case locationID:
			id = value
		case locationLine:
			return bytes.each(func(number int, value uint64, _ message) error {
				if number == lineFunction {
					functions = append(functions, value)
				}
				return nil
			})
		}
		return nil
	})
	k.locations[id] = functions
	return err
}

func (k *symbols) function(m message) error {
	var id uint64
	var f function
	err := m.each(func(number int, value uint64, _ message) error {
		switch number {
		case functionID:
			id = value
		case functionName:
			f.name = value
		case functionFile:
			f.file = value
		}
		return nil
	})
	k.functions[id] = f
	return err
}

func (k *symbols) sample(m message) (stack, error) {
	var locations, values []uint64
	err := m.each(func(number int, value uint64, bytes message) (err error) {
		switch number {
		case sampleLocations:
			locations, err = numbers(locations, value, bytes)
		case sampleValues:
			values, err = numbers(values, value, bytes)
		}
		return err
	})
	if err != nil || len(values) <= cpuValue {
		return stack{}, errors.Join(errProfile, err)
	}
	s := stack{nanos: int64(values[cpuValue])}
	for _, location := range locations {
		for _, id := range k.locations[location] {
			f := k.functions[id]
			if max(f.name, f.file) >= uint64(len(k.text)) {
				return stack{}, errProfile
			}
			s.frames = append(s.frames, frame{k.text[f.name], k.text[f.file]})
		}
	}
	return s, nil
}
