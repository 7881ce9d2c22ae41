package supervisor

import (
	"fmt"
	"strings"
	"testing"
)

func TestLastWordsKeepTheReason(t *testing.T) {
	var lines []string
	for i := range 40 {
		lines = append(lines, fmt.Sprintf("[ %d] RAX: 0", i))
	}
	lines[12] = "[ 12] Kernel panic - not syncing: sysrq triggered crash"
	got := lastWords(lines)
	if len(got) != maxLastWords {
		t.Errorf("%d lines", len(got))
	}
	if text := strings.Join(got, "\n"); !strings.Contains(text, "Kernel panic") || !strings.HasSuffix(text, "[ 39] RAX: 0") {
		t.Errorf("the reason or the end is missing:\n%s", text)
	}
	if short := lines[:3]; len(lastWords(short)) != 3 {
		t.Error("a short console is cut")
	}
}
