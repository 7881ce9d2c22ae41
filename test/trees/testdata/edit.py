# Changes a messy tree in every way. The argument is which of two rounds.
import os, shutil, sys

def write(p, b, mode="wb"):
    os.makedirs(os.path.dirname(p) or b".", exist_ok=True)
    with open(p, mode) as f:
        f.write(b)

def relink(p, target):
    if os.path.lexists(p):
        os.remove(p)
    os.symlink(target, p)

if sys.argv[1] == "2":
    write(b"plain.txt", b"round two\n")
    write(b"new/two\xff\n", b"two")
    for p in (b"moved", b"no-newline", b"latin1"):
        os.remove(p)
    shutil.rmtree(b"a b")
    os.chmod(b"run.sh", 0o755)
    relink(b"link", b"elsewhere")
    sys.exit()

for p in (b"plain.txt", b"crlf.txt", b"with space", b"-rf", b"--help", b"new\nline", b"tab\tname", b"back\\slash",
          b'quo"te', b"inv\xff\xfealid", b"dir\xff/x", b"esc\x1b[2J", "ünïcode".encode(), b"a b/c d", b"n" * 255, b"case",
          b"only-spaces/   ", b"glob*[a]?", b"a/b", b"a.b", b"+++ b/odd", b"patchy", b"nested/file", b"sub/lib.c", b"secret", b"mixed",
          b"deep/" * 60 + b"leaf"):
    write(p, b"added to it\n", "ab")
write(b"no-newline", b"still none", "wb")
write(b"empty", b"no longer\n")
write(b"binary", b"\0shorter")
write(b"latin1", b"th\xe9\n")
write(b"nul", b"now text\n")
lines = open("long.txt", "rb").readlines()
lines[5000] = b"changed in the middle\n"
del lines[100]
write(b"long.txt", b"".join(lines[:-1]) + lines[-1].rstrip(b"\n"))
# Added: odd names, odd content.
for p, b in ((b"added/new\nline", b"x"), (b"added/inv\xff", b"\xff\xfe"), (b"added/ ", b""), (b"added/-n", b"x\n"), (b"m" * 255, b"x\n"),
             (b"added/x\x01y", b"\r\n"), (b"/dev/null"[1:], b"not that one\n"), (b"a/b.c", b"@@ -1 +1 @@\n"), (b"b.o", b"ignored by Git\n"),
             (b'"', b"quote\n"), (b"\xc3", b"half a letter\n"), (b"a => b", b"x\n"), (b"{a => b}", b"x\n")):
    write(p, b)
write(b"added/script", b"#!/bin/sh\n")
os.chmod(b"added/script", 0o755)
# Deleted, renamed, copied.
os.remove(b"e\xcc\x81")
os.remove(b"read-only")
os.rename(b"bom.txt", b"moved")
os.rename(b"hard", b"hard2")
shutil.rmtree(b".hidden")
# Modes.
os.chmod(b"run.sh", 0o644)
os.chmod(b"trailing.", 0o755)
os.chmod(b"group", 0o600)
os.chmod(b"no-rights", 0o100)
# Links.
relink(b"link", b"Case")
relink(b"broken", b"plain.txt")
relink(b"absolute", b"/etc/shadow")
relink(b"odd-target", b"other\n\xff")
os.remove(b"loop")
os.symlink(b"-rf", b"--link")
# Types: file to link, link to file, file to directory, directory to file, link to directory, directory to link.
relink(b"Case", b"case")
os.remove(b"loop-a"); write(b"loop-a", b"a file now\n")
os.remove(b"untracked"); write(b"untracked/inner", b"x\n")
shutil.rmtree(b"hollow"); write(b"hollow", b"a file now\n")
os.remove(b"up"); write(b"up/x", b"x\n")
shutil.rmtree(b"only-spaces"); os.symlink(b"a", b"only-spaces")
# Nothing that a diff knows.
os.makedirs(b"made/empty")
os.mkfifo(b"pipe")
write(b".git/description", b"changed\n")
