#!/usr/bin/env bash
# A release: sdist, a wheel with the int4 kernels for Linux on x86-64, a wheel without for everything else. Each is
# checked, and the first of them installed into an empty environment, without a compiler, to chat there.
#
#   PYTHON=python3 TOOLS=.venv-dist/bin ARTIFACT=artifacts/demo-openvino-int4 bash scripts/dist.sh
#
# Nothing is published: that is for .github/workflows/release.yml.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { echo "== $*" >&2; }

say "sdist, and the wheel with kernels, built from it"
rm -rf dist
NORMISTRAL_KERNELS=require "$TOOLS/python" -m build --outdir "$work/linux" .

say "its tag, by the symbols that the kernels need beside OpenVINO's and oneTBB's libraries"
# OpenVINO's own tag, though the kernels' symbols would allow an older one.
PATH="$PWD/$TOOLS:$PATH" "$TOOLS/python" -m auditwheel repair --wheel-dir dist --plat manylinux_2_28_x86_64 --only-plat \
	--exclude "libopenvino.so.*" --exclude "libtbb.so.*" "$work"/linux/*.whl
mv "$work"/linux/*.tar.gz dist/

say "the wheel without kernels, from the same sdist"
mkdir "$work/source"
tar -C "$work/source" --strip-components 1 -xzf dist/*.tar.gz
NORMISTRAL_KERNELS=none "$TOOLS/python" -m build --wheel --outdir dist "$work/source"

say "their descriptions"
"$TOOLS/python" -m twine check --strict dist/*

for wheel in dist/*manylinux*.whl dist/*none-any.whl; do
	say "installed into an empty environment: $wheel"
	"$PYTHON" -m venv --clear "$work/empty"
	"$work/empty/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
	CXX=no-compiler-here NORMISTRAL_HOME="$work/home" "$work/empty/bin/normistral" doctor | grep "int4 on OpenVINO"
	answer=$(CXX=no-compiler-here NORMISTRAL_HOME="$work/home" "$work/empty/bin/normistral" chat "$ARTIFACT" \
		--greedy --prompt "What is the capital of Norway?")
	echo "$answer"
	grep -q Oslo <<<"$answer"
done
ls -l dist >&2
