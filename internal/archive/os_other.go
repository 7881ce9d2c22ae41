//go:build !unix

package archive

func isFull(error) bool { return false }

const oNonblock = 0
