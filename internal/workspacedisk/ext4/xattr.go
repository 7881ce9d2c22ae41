package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/pyro-mcp/pyro/api"
)

// Extended attributes, document "Extended Attributes": entries from the front
// of an area, each with a namespace's number, and values from its back.
const (
	xattrMagic     = 0xEA020000
	xattrEntryLen  = 16
	xattrHeaderLen = 32 // of a block of attributes
)

// xattrPrefixes are the namespaces. Those of 2 and 3 are whole names.
var xattrPrefixes = map[byte]string{
	1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default",
	4: "trusted.", 6: "security.", 7: "system.",
}

// Xattrs returns the extended attributes of ino by full name, with values as
// they are stored: those of ACLs differ from what system calls show. Names in
// unknown namespaces are left out. A value in an inode of its own (ea_inode)
// is ErrUnsupported. Names and values together are bounded by the size of an
// inode and a block.
func (fs *FS) Xattrs(ino *Inode) (map[string][]byte, error) {
	attrs, err := fs.readXattrs(ino)
	if err != nil {
		return nil, fmt.Errorf("reading the extended attributes of inode %d: %w", ino.Number, err)
	}
	return attrs, nil
}

func (fs *FS) readXattrs(ino *Inode) (map[string][]byte, error) {
	raw, err := fs.rawInode(ino.Number)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	attrs := map[string][]byte{}
	if len(raw) > 128 {
		start := 128 + int(le.Uint16(raw[0x80:]))
		if start+4 <= len(raw) && le.Uint32(raw[start:]) == xattrMagic {
			body := raw[start+4:]
			if err := addXattrs(attrs, body, body); err != nil {
				return nil, err
			}
		}
	}
	number := uint64(le.Uint32(raw[0x68:]))
	if fs.sb.incompat&incompat64Bit != 0 {
		number |= uint64(le.Uint16(raw[0x76:])) << 32
	}
	if number == 0 {
		return attrs, nil
	}
	blk, err := fs.block(number)
	if err != nil {
		return nil, err
	}
	if le.Uint32(blk) != xattrMagic {
		return nil, damaged("their block %d has no magic number", number)
	}
	if fs.sb.hasMetaCsum() {
		c := crc32c(fs.sb.csumSeed, le.AppendUint64(nil, number))
		c = crc32c(c, blk[:16])
		c = crc32c(c, []byte{0, 0, 0, 0})
		if c, want := crc32c(c, blk[20:]), le.Uint32(blk[16:]); c != want {
			return nil, damaged("the checksum of block %d is 0x%08x, not 0x%08x", number, c, want)
		}
	}
	return attrs, addXattrs(attrs, blk[xattrHeaderLen:], blk)
}

// addXattrs reads the entries at the front of area. Offsets of values count
// from the start of values, of which area is the end.
func addXattrs(attrs map[string][]byte, area, values []byte) error {
	le := binary.LittleEndian
	for rest := area; len(rest) >= 4 && le.Uint32(rest) != 0; {
		if len(rest) < xattrEntryLen {
			return damaged("they run over their end")
		}
		nameLen := int(rest[0])
		off, inode, size := int(le.Uint16(rest[2:])), le.Uint32(rest[4:]), le.Uint32(rest[8:])
		next := (xattrEntryLen + nameLen + 3) &^ 3
		if next > len(rest) {
			return damaged("they run over their end")
		}
		prefix, known := xattrPrefixes[rest[1]]
		name := prefix + string(rest[xattrEntryLen:xattrEntryLen+nameLen])
		rest = rest[next:]
		if !known {
			continue
		}
		if inode != 0 {
			return api.Errorf(api.ErrUnsupported, "the value of %q lies in an inode of its own", name)
		}
		if uint64(off)+uint64(size) > uint64(len(values)) {
			return damaged("the value of %q, %d bytes, lies outside", name, size)
		}
		attrs[name] = bytes.Clone(values[off : off+int(size)]) // values is the cache
	}
	return nil
}
