"""Tokens that never occur leave the table, and what is computed of the others stays."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from pl_sparse import Pruner, Sparsity
from pl_sparse.export import TokenMap, load_shrunk, save_shrunk, shrink_vocabulary
from pl_sparse.schedule import OneShot


class Language(LightningModule):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 6, padding_idx=1)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 40, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)).tanh())

    def training_step(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.1, weight_decay=0.0)


OCCUR = [0, 3, 4, 9, 17]


def trained(net: Language, **options: Any) -> Sparsity:
    callback = Sparsity(
        scorer="occurrence", schedule=OneShot(final=1.0, begin=1.0), structure="vocabulary", report=False, **options
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor(OCCUR)[torch.randint(5, (8, 4, 7), generator=generator)]
    Trainer(
        max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(net, DataLoader(list(ids), batch_size=None))  # fmt: skip
    return callback


def test_a_model_whose_tokens_were_noted_is_pickled() -> None:
    net = Language(True)
    pruner = Pruner(scorer="occurrence", schedule=OneShot(final=1.0, begin=1.0), structure="vocabulary")
    pruner.attach(net)
    pruner.prepare(4)
    ids = torch.tensor([OCCUR])
    net.train()(ids)
    assert pruner.params[0].state["seen"].nonzero().flatten().tolist() == sorted({*OCCUR, 1})
    again = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(again.eval()(ids), net.eval()(ids))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_never_occur_are_removed_and_others_keep_their_outputs(tied: bool, tmp_path: Path) -> None:
    net = Language(tied)
    pruner = trained(net).pruner
    kept = sorted({*OCCUR, 1})  # the loop: what occurred, and padding
    assert pruner.params[0].mask.any(1).nonzero().flatten().tolist() == kept
    for row in set(range(40)) - set(kept):
        assert not net.table.weight[row].any() and not net.head.weight[row].any()
        assert tied or net.head.bias[row] == 0
    ids = torch.tensor([OCCUR, [*OCCUR[::-1]]])
    with torch.no_grad():
        before = net.eval()(ids)
    plan, tokens = shrink_vocabulary(net, ids, {p.name: p.mask for p in pruner.params})
    assert list(tokens.kept) == kept and net.table.weight.shape == (6, 6) and net.head.out_features == 6
    assert net.table.padding_idx == kept.index(1) and (net.head.weight is net.table.weight) is tied
    with torch.no_grad():
        torch.testing.assert_close(net(tokens(ids)), before[..., kept])
        save_shrunk(net, plan, tmp_path)
        tokens.save(tmp_path)
        fresh = Language(tied)
        load_shrunk(fresh, tmp_path)
        torch.testing.assert_close(fresh(TokenMap.load(tmp_path)(ids)), before[..., kept])
    with pytest.raises(ValueError, match="token 2 was removed"):
        tokens(torch.tensor([2]))
    assert tokens(torch.tensor([2, 9, -100]), unknown=0).tolist() == [0, kept.index(9), -100]


def test_tokens_of_a_hugging_face_model_with_its_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=5, eos_token_id=6,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config)
    pruner = Pruner("occurrence", OneShot(final=1.0, begin=1.0), "vocabulary", sparsity=1.0)
    pruner.attach(net)
    ids = torch.tensor([[8, 9, 30, 9]])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(ids).logits.sum().backward()
    net.eval()(torch.tensor([[12]]))  # not training
    pruner.before_step(0, 1, optimizer)
    optimizer.step()
    pruner.after_step()
    kept = [0, 5, 6, 8, 9, 30]
    with torch.no_grad():
        before = net(ids).logits
        _, tokens = shrink_vocabulary(net, {"input_ids": ids}, {p.name: p.mask for p in pruner.params})
        assert list(tokens.kept) == kept
        again = type(net)(net.config)
        again.load_state_dict(net.state_dict())
        torch.testing.assert_close(again.eval()(tokens(ids)).logits, before[..., kept])
    now = net.config
    assert (now.vocab_size, now.pad_token_id, now.bos_token_id, now.eos_token_id) == (6, 0, 1, 2)


def test_what_a_vocabulary_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="use scorer=occurrence"):
        Sparsity(structure="vocabulary", sparsity=1.0)
    with pytest.raises(ValueError, match=r"oneshot with begin=1\.0"):
        Sparsity(scorer="occurrence", structure="vocabulary", sparsity=1.0)
    with pytest.raises(ValueError, match="use structure=vocabulary"):
        Sparsity(scorer="occurrence", sparsity=0.5)
    pruner = Pruner("occurrence", OneShot(final=1.0, begin=1.0), "vocabulary")
    with pytest.raises(ValueError, match=r"one table of tokens in Sequential.*found none"):
        pruner.attach(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="no row of table is masked"):
        shrink_vocabulary(Language(tied=False), torch.tensor([[0]]), {})
