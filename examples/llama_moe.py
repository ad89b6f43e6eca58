"""
A decoder with experts: zeros within the experts alone
======================================================

A Llama-shaped decoder whose feed-forward layers are mixtures of experts (Mixtral). Most of its weights are in experts,
each of which sees a part of the tokens. The experts are pruned to 80 %; attention, routers and embeddings stay dense.
Needs the extra ``transformers``; the model is made from a configuration.
"""

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from pl_sparse import Pruner

# %%
# The language: each token is the sum of the two before it, modulo 17.


def texts(count: int, length: int = 12, seed: int = 0) -> torch.Tensor:
    tokens = torch.randint(17, (count, 2), generator=torch.Generator().manual_seed(seed))
    while tokens.shape[1] < length:
        tokens = torch.cat([tokens, (tokens[:, -1:] + tokens[:, -2:-1]) % 17], 1)
    return tokens


@torch.no_grad()
def accuracy(model: MixtralForCausalLM) -> float:
    tokens = texts(256, seed=1)
    said = model.eval()(input_ids=tokens).logits[:, 1:-1].argmax(-1)
    return float((said == tokens[:, 2:]).float().mean())


torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
config = MixtralConfig(vocab_size=17, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, **sizes)
model = MixtralForCausalLM(config)

# %%
# A plain loop. Patterns say what is pruned; each tensor keeps a fifth of its weights (``allocation="uniform"``).

steps = 400
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
pruner = Pruner(include=["*.experts.*"], allocation="uniform", sparsity=0.8)
pruner.attach(model)
pruner.prepare(steps)
for step in range(steps):
    tokens = texts(64, seed=100 + step)
    optimizer.zero_grad()
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    pruner.before_step(step, optimizer=optimizer)
    optimizer.step()
    pruner.after_step()

# %%
# The zeros of each expert, and the accuracy of the model.

for name, weight in model.named_parameters():
    if ".experts." in name:  # (experts, out, in)
        zeros = (weight == 0).flatten(1).float().mean(1)
        print(f"{name}: zeros of each expert {', '.join(f'{share:.1%}' for share in zeros.tolist())}")
right = accuracy(model)
others = sum(int((weight == 0).sum()) for name, weight in model.named_parameters() if ".experts." not in name)
print(f"sparsity of the experts {pruner.sparsity:.4f}, zeros elsewhere {others}, accuracy {right:.3f}")
