# Makes changes below the working directory: do(JSON). What is not possible is left.
import json, os, shutil

def one(o, path, arg):
    do, mode = o["do"], o["mode"]
    if os.path.dirname(path) and do in ("write", "link", "mkdir"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    if do == "write":
        if os.path.islink(path):
            os.remove(path)
        open(path, "wb").write(arg)
        os.chmod(path, mode)
    elif do == "append" and os.path.isfile(path) and not os.path.islink(path):
        open(path, "ab").write(arg)
    elif do == "line" and os.path.isfile(path) and not os.path.islink(path):
        lines = open(path, "rb").read().split(b"\n")
        lines[len(lines) // 2] = arg[:20]
        open(path, "wb").write(b"\n".join(lines))
    elif do == "delete":
        os.remove(path)
    elif do == "rename":
        os.rename(path, arg)
    elif do == "chmod" and not os.path.islink(path):
        os.chmod(path, mode | 0o700 if os.path.isdir(path) else mode)
    elif do == "link":
        if os.path.lexists(path):
            os.remove(path)
        os.symlink(arg, path)
    elif do == "mkdir":
        os.mkdir(path)
    elif do == "rmtree":
        shutil.rmtree(path)
    elif do == "hardlink" and not os.path.islink(path):
        os.link(path, arg)

def do(text):
    top = os.path.realpath(b".")
    for o in json.loads(text):
        path, arg = bytes.fromhex(o["path"]), bytes.fromhex(o["with"])
        inside = lambda p: (os.path.realpath(os.path.dirname(p) or b".") + b"/").startswith(top + b"/")
        # Engine host confines nothing: never through a link to elsewhere.
        if not inside(path) or o["do"] in ("rename", "hardlink") and not inside(arg):
            continue
        try:
            one(o, path, arg)
        except OSError:
            pass
