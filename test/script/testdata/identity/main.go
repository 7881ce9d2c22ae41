// Program identity says as whom and where it runs, and writes the files that it
// is given the names of. It is what an image of one static program holds.
package main

import (
	"fmt"
	"os"
)

func main() {
	groups, err := os.Getgroups()
	if err != nil {
		fmt.Println(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		fmt.Println(err)
	}
	fmt.Println("uid", os.Getuid(), "gid", os.Getgid(), "groups", groups, "user", os.Getenv("USER"), "home", os.Getenv("HOME"), "in", dir)
	for _, name := range os.Args[1:] {
		if err := os.WriteFile(name, []byte("written\n"), 0o644); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
}
