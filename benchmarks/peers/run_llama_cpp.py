"""llama.cpp through the C interface of llama-cpp-python, which adds nothing worth measuring.

python run_llama_cpp.py FILE.gguf threads=2 [flash_attention=auto|on|off] [context=1024]
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from worker import Settings, Trace, serve, step_by_step

BATCH = 512
FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # enum llama_flash_attn_type


class LlamaRunner:
    """One context with llama.cpp's defaults (mmap, weights repacked for this CPU) but for what is set."""

    def __init__(self, file: Path, settings: Settings) -> None:
        self.settings = {"threads": "2", "flash_attention": "auto", "context": "1024"} | settings
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), model_parameters)
        if not self.model:
            raise SystemExit(f"error: llama.cpp could not load {file}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = int(self.settings["context"])
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = int(self.settings["threads"])
        parameters.flash_attn_type = FLASH_ATTENTION[self.settings["flash_attention"]]
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("error: llama.cpp could not make a context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def describe(self) -> Settings:
        system = llama_cpp.llama_print_system_info().decode().strip(" |")
        library = f"llama-cpp-python {llama_cpp.__version__}"
        return {"library": library, "system": system, "batch": str(BATCH), **self.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        step_by_step(self.feed, token_ids, count, trace)

    def feed(self, token_ids: list[int]) -> int:
        for start in range(0, len(token_ids), BATCH):
            logits = self.logits(token_ids[start : start + BATCH])
        return int(logits.argmax())

    def logits(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Append tokens; logits [vocabulary] of the last one, a view."""
        tokens = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(token_ids)))
        if code:
            raise SystemExit(f"error: llama_decode gave {code}")
        address = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))


if __name__ == "__main__":
    serve(LlamaRunner)
