package testdata

import "testing"

//page:topic 2 Anchors

// BenchmarkDrop drops it.
//
//page:row dropping
func BenchmarkDrop(b *testing.B) {}
