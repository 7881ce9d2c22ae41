package ext4image

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/pyro-mcp/pyro/api"
)

// An xattr is one extended attribute as it is stored: the namespace is a
// number (ext4 "Extended Attributes").
type xattr struct {
	index byte
	name  string // without the namespace
	value []byte
}

var xattrNamespaces = []struct {
	prefix string
	index  byte
}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}}

const (
	xattrMagic       = 0xEA020000
	xattrEntrySize   = 16
	xattrInInode     = inodeSize - 160 - 4 // behind the 160 bytes of fields and the magic
	xattrBlockHeader = 32
)

func newXattrs(attrs map[string][]byte) ([]xattr, error) {
	var out []xattr
	total := xattrBlockHeader + 4
	for full, value := range attrs {
		for _, ns := range xattrNamespaces {
			name, ok := strings.CutPrefix(full, ns.prefix)
			if !ok {
				continue
			}
			if name == "" || len(name) > 255 {
				return nil, api.Errorf(api.ErrInvalid, "an extended attribute's name has %d bytes", len(name))
			}
			x := xattr{ns.index, name, value}
			total += x.size()
			out = append(out, x)
		}
	}
	if total > blockSize {
		return nil, api.Errorf(api.ErrExhausted, "one file's extended attributes take %d bytes, the limit is %d", total, blockSize)
	}
	// The order that the kernel keeps in a block.
	slices.SortFunc(out, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), cmp.Compare(a.name, b.name))
	})
	return out, nil
}

func align4(n int) int { return (n + 3) &^ 3 }

func (x xattr) size() int { return align4(xattrEntrySize+len(x.name)) + align4(len(x.value)) }

func fitsInode(attrs []xattr) bool {
	total := 4 // the end mark
	for _, x := range attrs {
		total += x.size()
	}
	return total <= xattrInInode
}

// encodeXattrs writes entries from the front of area and values from its back.
// Value offsets count from base bytes before area.
func encodeXattrs(area []byte, base int, attrs []xattr) (hash uint32) {
	le := binary.LittleEndian
	pos, end := 0, len(area)
	for _, x := range attrs {
		end -= align4(len(x.value))
		copy(area[end:], x.value)
		e := area[pos:]
		e[0] = byte(len(x.name))
		e[1] = x.index
		le.PutUint16(e[2:], uint16(base+end))
		le.PutUint32(e[8:], uint32(len(x.value)))
		h := x.hash()
		le.PutUint32(e[12:], h)
		copy(e[xattrEntrySize:], x.name)
		pos += align4(xattrEntrySize + len(x.name))
		hash = hash<<16 ^ hash>>16 ^ h
	}
	return hash
}

// hash is the kernel's ext4_xattr_hash_entry.
func (x xattr) hash() (h uint32) {
	for _, c := range []byte(x.name) {
		h = h<<5 ^ h>>27 ^ uint32(c)
	}
	padded := make([]byte, align4(len(x.value)))
	copy(padded, x.value)
	for i := 0; i < len(padded); i += 4 {
		h = h<<16 ^ h>>16 ^ binary.LittleEndian.Uint32(padded[i:])
	}
	return h
}

// encodeXattrBlock makes the block for attributes that the inode has no room
// for.
func encodeXattrBlock(attrs []xattr) []byte {
	le := binary.LittleEndian
	b := make([]byte, blockSize)
	le.PutUint32(b[0:], xattrMagic)
	le.PutUint32(b[4:], 1) // references
	le.PutUint32(b[8:], 1) // blocks
	le.PutUint32(b[12:], encodeXattrs(b[xattrBlockHeader:], xattrBlockHeader, attrs))
	return b
}
