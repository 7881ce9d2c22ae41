# Prints what lies below the working directory as {hex(path): hex(what)}.
import hashlib, json, os, stat

found = {}

def walk(d):
    for n in os.listdir(d or b"."):
        p = d + b"/" + n if d else n
        s = os.lstat(p)
        if stat.S_ISDIR(s.st_mode):
            what = b"dir"
            walk(p)
        elif stat.S_ISLNK(s.st_mode):
            what = b"link " + os.readlink(p)
        elif stat.S_ISREG(s.st_mode):
            h = hashlib.sha256(open(p, "rb").read()).hexdigest()
            what = (b"exec " if s.st_mode & 0o100 else b"file ") + h.encode()
        else:
            continue  # pipes and the like are no files
        found[p.hex()] = what.hex()

walk(b"")
print(json.dumps(found))
