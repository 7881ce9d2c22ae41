package qemu

import (
	"encoding/json"
	"fmt"
)

// The nodes of a machine's disk, as QEMU's -blockdev and blockdev-add take them
// (BlockdevOptions in qapi/block-core.json). Every format and what lies below
// what is stated, never guessed: a guest can write any header it likes into a
// raw disk.

// readOnlyFile is the node of an open file that is not written.
func readOnlyFile(name, filename string) map[string]any {
	return map[string]any{"driver": "file", "node-name": name, "filename": filename, "read-only": true}
}

// fileNode is the node of an open file that holds a writable layer. discard
// gives deleted blocks back.
func fileNode(name, filename string, ephemeral bool) map[string]any {
	return flushing(map[string]any{"driver": "file", "node-name": name, "filename": filename, "discard": "unmap"}, ephemeral)
}

// diskNode is the node of a writable layer on its file's node. below is the name
// of the node that it stands on, nil for none yet.
func diskNode(name string, below any, ephemeral bool) map[string]any {
	return flushing(map[string]any{"driver": "qcow2", "node-name": name, "file": name + "-file", "backing": below, "discard": "unmap"}, ephemeral)
}

func flushing(options map[string]any, ephemeral bool) map[string]any {
	if ephemeral {
		options["cache"] = map[string]any{"no-flush": true}
	}
	return options
}

func (c *command) blockdev(options map[string]any) {
	b, err := json.Marshal(options)
	if err != nil {
		panic(err) // strings and booleans only
	}
	c.add("-blockdev", string(b))
}

// addChain adds the nodes of a chain whose last is called "disk", and returns
// the names of all, from that of the image to "disk".
func (c *command) addChain(in chain, ephemeral bool) []string {
	c.blockdev(readOnlyFile("base-file", fdsetPath(c.passSet(in.base))))
	c.blockdev(map[string]any{"driver": "raw", "node-name": "base", "read-only": true, "file": "base-file"})
	names := []string{"base"}
	for i, f := range in.layers {
		name := fmt.Sprintf("layer-%d", i)
		c.blockdev(readOnlyFile(name+"-file", fdsetPath(c.passSet(f))))
		c.blockdev(map[string]any{"driver": "qcow2", "node-name": name, "read-only": true, "file": name + "-file", "backing": names[i]})
		names = append(names, name)
	}
	c.diskSet = c.passSet(in.disk)
	c.blockdev(fileNode("disk-file", fdsetPath(c.diskSet), ephemeral))
	c.blockdev(diskNode("disk", names[len(names)-1], ephemeral))
	return append(names, "disk")
}
