package gvisor

import (
	"context"
	"os"
)

// CopyTree copies the directory upper of one layer into another, which exists.
func CopyTree(ctx context.Context, from, to *os.Root) error {
	c := &treeCopier{to: to, linked: map[uint64]string{}}
	return c.entry(ctx, from, to, UpperDir, UpperDir, 0)
}

// CopyImage makes out a copy of in.
func CopyImage(ctx context.Context, out, in *os.File) (copied int64, err error) {
	return copyImage(ctx, out, in)
}
