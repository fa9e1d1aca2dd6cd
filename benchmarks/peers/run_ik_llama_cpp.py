"""ik_llama.cpp through the C interface of ik-llama-cpp-python.

python run_ik_llama_cpp.py FILE.gguf threads=2 [flash_attention=default|on|off] [repack=off|on] [context=1024]
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

import ik_llama_cpp._ctypes_api as ik
import numpy as np
from worker import Settings, Trace, serve, step_by_step

BATCH = 512


class IkLlamaRunner:
    """One context with the library's defaults but for what is set.

    `repack` rewrites the weights for this processor while they are loaded, and does not map them then.
    """

    def __init__(self, file: Path, settings: Settings) -> None:
        self.settings = {"threads": "2", "flash_attention": "default", "repack": "off", "context": "1024"} | settings
        ik.llama_backend_init()
        model_parameters = ik.llama_model_default_params()
        if self.settings["repack"] == "on":
            model_parameters.repack_tensors, model_parameters.use_mmap = True, False
        self.model = ik.llama_model_load_from_file(str(file).encode(), model_parameters)
        if not self.model:
            raise SystemExit(f"error: ik_llama.cpp could not load {file}")
        parameters = ik.llama_context_default_params()
        parameters.n_ctx = int(self.settings["context"])
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = int(self.settings["threads"])
        if self.settings["flash_attention"] != "default":
            parameters.flash_attn = self.settings["flash_attention"] == "on"
        self.settings["flash_attention"] = "on" if parameters.flash_attn else "off"
        self.context = ik.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise SystemExit("error: ik_llama.cpp could not make a context")
        self.vocabulary = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self.model))
        self.length = 0

    def describe(self) -> Settings:
        ik._lib.llama_print_system_info.restype = ctypes.c_char_p
        system = ik._lib.llama_print_system_info().decode().strip(" |")
        library = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"
        return {"library": library, "system": system, "batch": str(BATCH), **self.settings}

    def generate(self, token_ids: list[int], count: int, trace: Trace) -> None:
        ik.llama_kv_cache_clear(self.context)
        self.length = 0
        step_by_step(self.feed, token_ids, count, trace)

    def feed(self, token_ids: list[int]) -> int:
        for start in range(0, len(token_ids), BATCH):
            chunk = token_ids[start : start + BATCH]
            tokens = (ik.llama_token * len(chunk))(*chunk)
            # One sequence whose positions go up by one; logits of the last token only.
            batch = ik.llama_batch(n_tokens=len(chunk), token=tokens, all_pos_0=self.length, all_pos_1=1, all_seq_id=0)
            if code := ik.llama_decode(self.context, batch):
                raise SystemExit(f"error: llama_decode gave {code}")
            self.length += len(chunk)
        address = ctypes.cast(ik.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self.vocabulary,)).argmax())


if __name__ == "__main__":
    serve(IkLlamaRunner)
