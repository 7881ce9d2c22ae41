package testdata

import "testing"

//page:topic 1 Boats
// The reference is a raft
// of logs.

// BenchmarkRow rows across. It is
// alternately measured.
//
//page:row rowing
//page:aim ratio <= 1.5
func BenchmarkRow(b *testing.B) {}

// BenchmarkSail sails.
//
//page:row sailing
//page:aim wind/tide >= 2
func BenchmarkSail(b *testing.B) {}

// BenchmarkSwim swims.
//
//page:row swimming
func BenchmarkSwim(b *testing.B) {}
