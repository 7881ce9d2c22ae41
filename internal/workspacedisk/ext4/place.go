package ext4

// JournalInode is the inode of the internal journal, or nil where there is
// none.
func (fs *FS) JournalInode() (*Inode, error) {
	if fs.sb.compat&compatHasJournal == 0 || fs.sb.journalInode == 0 {
		return nil, nil
	}
	return fs.Inode(fs.sb.journalInode)
}

// BlockSize is the filesystem's block size in bytes.
func (fs *FS) BlockSize() int64 { return int64(fs.sb.blockSize) }

// DataPlaces calls fn for each stretch of the device, in bytes, that holds
// content of ino from byte from on, until fn returns an error. Inline content
// and fast symlinks lie at InodePlace. Two inodes of a damaged filesystem may
// claim the same place.
func (fs *FS) DataPlaces(ino *Inode, from int64, fn func(off, length int64) error) error {
	fast := ino.IsSymlink() && ino.flags&flagExtents == 0 && ino.Size < int64(len(ino.blocks))
	if ino.inline != nil || fast || !ino.IsDir() && !ino.IsRegular() && !ino.IsSymlink() {
		return nil
	}
	bs := fs.BlockSize()
	for n, end := from/bs, (ino.Size+bs-1)/bs; n < end; {
		r, err := fs.mapBlock(ino, uint64(n))
		if err != nil {
			return err
		}
		count := min(int64(r.count), end-n)
		if !r.hole {
			if err := fn(int64(r.start)*bs, count*bs); err != nil {
				return err
			}
		}
		n += count
	}
	return nil
}

// InodePlace returns where on the device inode n itself lies, in bytes.
func (fs *FS) InodePlace(n uint32) (off, length int64, err error) {
	if n == 0 || n > fs.sb.inodes {
		return 0, 0, damaged("the filesystem has the inodes 1 to %d", fs.sb.inodes)
	}
	table, err := fs.inodeTable(uint64(n-1) / uint64(fs.sb.inodesPerGroup))
	if err != nil {
		return 0, 0, err
	}
	length = int64(fs.sb.inodeSize)
	in := int64((n-1)%fs.sb.inodesPerGroup) * length
	if table >= fs.sb.blocks || in+length > fs.Size()-int64(table)*fs.BlockSize() {
		return 0, 0, damaged("inode %d lies outside of the filesystem", n)
	}
	return int64(table)*fs.BlockSize() + in, length, nil
}

// ReadDevice fills p from byte off of the device, as it is after recovery.
func (fs *FS) ReadDevice(p []byte, off int64) error { return readFull(fs.r, p, off) }
