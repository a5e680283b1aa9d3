"""Sparsity Induction (arXiv 2602.21652): before a block is pruned, learn what each input's weights are to count.


`pairs` says which weights of a block can be scaled against each other without a change of its function: from how families
are wired (`wiring`) and how heads share channels (`heads`). `folding` does it.
`scales` are what is learned, `initial` where they begin, `training` how they are learned: through hard masks (`relaxation`),
with scores that follow the scales without a new forward (`scores`), and with the paper's spectral term (`spectral`).
`inducer` does it all to a block, and has the guard's say.
"""
