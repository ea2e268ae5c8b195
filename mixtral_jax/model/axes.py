"""THE legend. Every einsum and every shape annotation of this project uses these letters.

=====  ==========================================================  =======================
letter meaning                                                     8x7B
=====  ==========================================================  =======================
B      batch rows
T      query tokens of one call
S      cached tokens (key and value positions)
D      embed: channels of the residual stream                      4096
H      query heads                                                 32
K      key/value heads                                             8
G      query heads per key/value head, H // K                      4
C      channels per head                                           128
E      experts                                                     8
A      experts chosen per token                                    2
F      hidden channels of one expert                               14336
N      routed rows: tokens flattened, B * T                        B * T
V      vocabulary                                                  32000
O, I   outputs and inputs of any one matrix                        weights are ``[O, I]``
L      layers                                                      32
=====  ==========================================================  =======================

Logical axis names of weights (what ``sharding/rules.py`` maps to mesh axes):

``vocab`` (V), ``embed`` (D), ``heads`` (H * C), ``kv_heads`` (K * C), ``expert`` (E, stacked
experts), ``router_expert`` (E, rows of the router), ``mlp`` (F), ``norm`` (D, norm scales).
"""

WEIGHT_AXES = (
    "vocab",
    "embed",
    "heads",
    "kv_heads",
    "expert",
    "router_expert",
    "mlp",
    "norm",
)
