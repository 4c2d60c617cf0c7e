"""One file per `model_type`.

To add one, imitate `llama.py`:

1. `groups(config)` lists the groups of every layer (see `edgeprune.groups`);
2. `BASE` names the stock `transformers` class;
3. `SOURCE` says which graph builder exports it: "decoder" (declarative, fused ops) or "traced" (torch.onnx);
4. `INTERCEPT` (optional) names, for the groups "heads" and "channels", the config switch that gives all Linears of that
   kind biases; without one, the refit that adds an intercept is refused.

Then add its tiny config to `tests/toys.py`; the suites run over every file of this folder.
"""
