"""Bundles real artifacts, installs them where there is no network, asks them something, and changes bytes.

    python tests/scripts/show_bundle.py ARTIFACT… [--flips 200] [--python /usr/bin/python3] [--keep FOLDER]

Not in the suite: it needs pip's index, the right to make a network namespace (unshare of util-linux), and minutes.
Ends with exit code 1 if anything was not as it should be.
"""

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from normistral.bundle.check import BLOCK, InstallError, check_bundle, member_header

QUESTION, ANSWER = "What is the capital of Norway?", "Oslo"
# A shell without a network: not even loopback is up.
ALONE = ["unshare", "--net", "--map-root-user"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = options.keep or Path(folder)
        folder.mkdir(exist_ok=True)
        key = folder / "key"
        if not key.exists():
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
        (folder / "allowed_signers").write_text(f"release@example.no {key.with_suffix('.pub').read_text()}")
        good = [show(artifact, folder, options) for artifact in options.artifacts]
    return 0 if all(good) else 1


def show(artifact, folder, options):
    file = folder / f"{artifact.name}.tar"
    for old in (file, Path(f"{file}.sig")):
        old.unlink(missing_ok=True)
    call([sys.executable, "-m", "normistral", "bundle", artifact, file, "--sign-with", folder / "key"])
    first = file.read_bytes() if file.stat().st_size < 2**29 else None
    call([sys.executable, "-m", "normistral", "bundle", artifact, file, "--sign-with", folder / "key", "--force"])
    print(f"# a second run gives the same bytes: {first is None or first == file.read_bytes()}")
    said = install_alone(file, options.python)
    print(f"# {QUESTION!r} is answered with {ANSWER}: {ANSWER in said}")
    missed = flip(file, folder / "allowed_signers", options.flips)
    return ANSWER in said and not missed and (first is None or first == file.read_bytes())


def install_alone(file, python):
    """What the box without a network does, from the two files and the signers' list to an answer."""
    with tempfile.TemporaryDirectory() as home:
        script = f"""
set -e
cd {shlex.quote(str(file.parent))}
ip -brief address 2>/dev/null || cat /proc/net/dev | tail -n +3
{python} -c 'import socket; socket.create_connection(("192.0.2.1", 443), 3)' 2>&1 | tail -n 1
ssh-keygen -Y verify -f allowed_signers -I release@example.no -n normistral-bundle -s {file.name}.sig < {file.name}
tar -C $HOME -xf {file.name} install.py
{python} -I $HOME/install.py {file.name} --signers allowed_signers
{python} -I $HOME/install.py {file.name} --signers allowed_signers
du -sh $HOME/.local/share/normistral/artifacts $HOME/.local/share/normistral/runtimes
$HOME/.local/share/normistral/bin/normistral chat {file.stem} --prompt {shlex.quote(QUESTION)}
"""
        environment = {"HOME": home, "PATH": os.environ["PATH"], "LC_ALL": "C"}
        return call([*ALONE, "sh", "-c", script], env=environment)


def flip(file, signers, number):
    """One changed bit at a time: anywhere, then in what is no file's content; structure alone, and by the signature."""
    chance, whole = random.Random(1), check_bundle(file, signers)
    size = file.stat().st_size
    places = [chance.randrange(size) for _ in range(number // 2)]
    outside = []
    for name, member in whole.members.items():
        head = len(member_header(name, member.size))
        outside += range(member.offset - head, member.offset)
        outside += range(member.offset + member.size, member.offset + member.size + -member.size % BLOCK)
        if name == "SHA256SUMS":
            outside += range(member.offset, member.offset + member.size)
    outside += range(size - 2 * BLOCK, size)
    places += chance.sample(outside, number - len(places))
    refused, missed, started = Counter(), 0, time.perf_counter()
    for count, position in enumerate(places):
        by_signature = count % 10 == 0
        with file.open("r+b") as stream:
            stream.seek(position)
            byte = stream.read(1)
            stream.seek(position)
            stream.write(bytes([byte[0] ^ 1 << chance.randrange(8)]))
        try:
            check_bundle(file, signers if by_signature else None)
            missed += 1
            print(f"# NOT REFUSED: position {position}")
        except InstallError as error:
            refused["by its signature" if by_signature else error.message.partition(":")[0]] += 1
        finally:
            with file.open("r+b") as stream:
                stream.seek(position)
                stream.write(byte)
    check_bundle(file, signers)
    took = time.perf_counter() - started
    print(f"# {number} changed bits, some of the {len(outside)} bytes that are in no file: {dict(refused)}")
    print(f"# not refused: {missed}; {took:.0f} s")
    raw, missed_signatures = Path(f"{file}.sig").read_bytes(), 0
    for position in range(0, len(raw), 10):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << chance.randrange(8)
        Path(f"{file}.sig").write_bytes(flipped)
        try:
            check_bundle(file, signers)
            missed_signatures += 1
        except InstallError:
            pass
    Path(f"{file}.sig").write_bytes(raw)
    print(f"# {-(-len(raw) // 10)} changed bits of the signature, not refused: {missed_signatures}")
    return missed + missed_signatures


def call(command, **options):
    """Run, show command and output, and give the output."""
    print("$", command[-1] if command[0] == "unshare" else shlex.join(map(str, command)), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    print(done.stdout, end="", flush=True)
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
