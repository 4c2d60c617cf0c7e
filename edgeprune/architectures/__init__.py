"""One file per `model_type`.

To add one, imitate `llama.py`, or `bloom.py` for fused projections and ALiBi:

1. `layer_groups(config, layer)` lists the groups of one layer (see `edgeprune.groups`);
2. `BASE` names the stock `transformers` class;
3. `SOURCE` says which graph builder exports it: "decoder" (declarative, fused ops) or "traced" (torch.onnx);
4. `WIDTHS` names the config key of each kind of width, and `STOCK` the kinds that stock code reads from the config as
   they are; the others it derives from hidden_size, so a checkpoint that changes them is saved per layer;
5. `ATTRIBUTES` names what the modules of a block wrote down when they were built and read as they run: path inside the
   block -> attribute -> what it counts ("heads", "kv_heads", "channels", "heads_each": query heads per KV head,
   "inner": heads * head_dim);
6. `CONFIG_READERS` (optional) are modules of a block that read widths off their `config` as they run;
7. `ALIBI` (optional) is the module of a block that is called with `alibi`, the biases of all heads of the dense model;
8. `RETURNS_TUPLE` (optional) is True where a block hands on a tuple, hidden states first;
9. `attention_routes(model, attend, call)` (optional) says what to replace in a model that computes attention in code of
   its own instead of transformers' attention interface, so that its traced graph has one operator for it
   (`edgeprune_export.routing`);
10. `INTERCEPT` (optional) names, for the groups "heads" and "channels", the config switch that gives all Linears of
    that kind biases, or None where the Linear that reads them always has one; without an entry, the refit that adds an
    intercept is refused;
11. `mlp(config)` (optional) names the modules of a block that one after the other make what the MLP adds to the rest,
    where these are not the one module around the Linear that reads channels; none if nothing is simply added;
12. `STAND_IN` (optional) names a type that computes the same and takes head counts that this one refuses.

A checkpoint in a form of its own, which no stock class reads, is converted as it is read (`baichuan.py`): `BECOMES`
names the type whose file says the rest, `stock_config(config, name)` makes that type's raw config,
`unpack(config, name)` says which of its tensors are made of the stored tensor `name` and how, and
`TOKENIZER = "sentencepiece"` says that `tokenizer.model` is all there is to its tokenizer.

Then add its tiny config to `tests/toys.py`; the suites run over every file of this folder.
"""
