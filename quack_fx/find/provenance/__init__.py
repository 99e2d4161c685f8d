"""Operand of a logit product -> weight rows of each head, chain of factors, norms in between.

In: the dataflow of a graph and the logits found in it. Out: attention sites, or a refusal with its reason. Operands are
walked back to the projections, and labels that name weight rows are carried forwards again.

    labels.py       sets of features as int64 tensors
    views.py        view ops run on labels
    projections.py  products with a weight: which row makes which feature
    flow.py         what is known about one tensor: labels, norms, scale
    rules/          what each kind of op does to features
    trace.py        from an operand back to the projections
    trail.py        what the tracer saw, for explanations
    vectors.py      features of an operand at each index of the head dimension
    pairing.py      which query vectors are multiplied with which key vectors
    heads.py        vectors -> heads
    block.py        a block under construction
    chains.py       projections before a projection (low rank, MLA)
    values.py       projections behind the values
    roles.py        names for the parts of a chain
    blocks.py       heads -> blocks, terms: a site
    uses.py         whether a norm is used for logits alone
    basis.py        the nodes that a site was derived from
    join.py         blocks that are parts of one block are joined
    repeat.py       equal layers are analysed once
    left_out.py     sites of layers that were not recorded
"""
