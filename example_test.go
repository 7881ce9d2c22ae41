package pyro_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/pyro-mcp/pyro"
	"github.com/pyro-mcp/pyro/api"
)

// One command in a fresh guest, its output as it comes.
func Example() {
	ctx := context.Background()
	client, err := pyro.Open(ctx, nil)
	if err != nil {
		log.Fatal(err)
	}
	result, err := client.Run(ctx, api.RunRequest{
		Environment: "debian:12",
		Argv:        []string{"python3", "-c", "print(6*7)"},
		Timeout:     10 * time.Second,
		Stdout:      os.Stdout,
	})
	if err != nil {
		log.Fatalf("%v (%s)", err, api.Hint(err))
	}
	fmt.Println(result.ExitCode, result.Engine, result.Isolation)
}

// A file out of a disk image, without mounting it.
func ExampleOpenDisk() {
	ctx := context.Background()
	disk, err := pyro.OpenDisk(ctx, "disk.ext4", pyro.DiskRaw)
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	file, err := disk.Read(ctx, "/etc/os-release", 64<<10)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(file.Content)
}
