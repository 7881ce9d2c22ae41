package guestkernel

// What the inner tests make, the outer ones use.
var (
	MakeModule  = makeModule
	MakeBzImage = func(kernel []byte) []byte { return makeBzImage(compressors["lz4"](kernel)) }
)
