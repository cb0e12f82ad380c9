"""What Hugging Face transformers computes with a checkpoint, in float32 and in bfloat16.

python3 transformers_logits.py CHECKPOINT PROMPTS.json OUT-FOLDER DEVICE

PROMPTS.json holds lists of token ids. Writes fp32.safetensors and bf16.safetensors with, for prompt i, `fp32.i.logits`
float32 (tokens, vocabulary) and `fp32.i.route_index` int32 (layers, tokens, experts a token); prints the versions as JSON.
"""

import json
import os
import sys
import time

import torch
import transformers
from safetensors.torch import save_file
from transformers import Gemma4ForCausalLM


def load(checkpoint, dtype, device):
    """The plainest implementations; a release that lacks a choice goes without it."""
    choices = [{"attn_implementation": "eager", "experts_implementation": "eager"}, {"attn_implementation": "eager"}, {}]
    for choice in choices:
        try:
            model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=dtype, **choice)
            return model.to(device).eval(), choice
        except (TypeError, ValueError, KeyError, ImportError, AttributeError) as error:
            print(f"not with {choice}: {error}", file=sys.stderr)
    raise SystemExit("transformers does not load the checkpoint")


def main():
    checkpoint, prompts_file, folder, device = sys.argv[1:]
    with open(prompts_file) as file:
        prompts = json.load(file)
    torch.set_float32_matmul_precision("highest")  # no TF32
    said = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        start = time.time()
        model, said[name] = load(checkpoint, dtype, device)
        loaded = time.time()
        routes = []

        def keep(_module, _inputs, output):
            index = [x for x in output if torch.is_tensor(x) and not x.is_floating_point()][0]
            routes.append(index.reshape(-1, index.shape[-1]).to(torch.int32).cpu())

        for module_name, module in model.named_modules():
            if module_name.endswith(".router"):
                module.register_forward_hook(keep)
        tensors = {}
        with torch.no_grad():
            for i, ids in enumerate(prompts):
                routes.clear()
                logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
                tensors[f"{name}.{i}.logits"] = logits.float().cpu().contiguous()
                if routes:
                    tensors[f"{name}.{i}.route_index"] = torch.stack(routes).contiguous()
        save_file(tensors, os.path.join(folder, f"{name}.safetensors"))
        print(f"{name}: loaded in {loaded - start:.1f} s, {time.time() - loaded:.1f} s for all prompts", file=sys.stderr)
        del model
        if device != "cpu":
            torch.cuda.empty_cache()
    print(json.dumps(said))


main()
