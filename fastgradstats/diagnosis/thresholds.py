"""Numbers that several readers of a record share, each with its origin. A leaf: imports nothing.

The elasticity E = |g| |w| / loss of the median layer separated 343 windows of 21 nets (MLPs and CNNs on digits and
Fashion-MNIST, 5 seeds): starved ones had at most .062, live ones at least .106, converged ones at least 2.67.
"""
STARVED      = .08                # median elasticity below it: the weights can hardly move the loss
CONVERGED    = .1                 # share of the first loss, and of a constant answer, below which hardly any is left
CONVERGED_E  = 1.                 # elasticity of a converged net that is told from a starved one by it: 2.67 and more
BLOCKED      = .33                # placebo of the median layer: starved nets had at most so much (trial, one seed) ...
PASSES       = 1.3                # ... live ones 5.4 and more: the geometric mean. Zoo, seed 0: .19, and .6 and more
DEAD_JUMP    = .75                # more dead units than in the activation before: its own fault; fading gives .53 (zoo)
AWAKE        = .5                 # median elasticity above which training is under way; forecasts are of passing it
SETTLE       = 5                  # the first iterations, in which elasticity alone misleads
SMALL_STEP   = 1e-4               # median update ratio below it: a step hardly moves; a tenth of cs231n's 1e-3
USUAL_STEP   = 1e-2               # median update ratio of healthy runs in the first 40 rows: .001 to .06 (zoo)
ADAPTIVE_STEP = .03               # of the first steps of Adam, lr an element whatever the gradient: .02 to .09 (zoo)
ADAM_LR      = 5e-3               # Adam's usual rate: healthy runs of the zoo .003 to .05, fastai's default .001
LARGE_STEP   = .1                 # ten times that
STARVED_GAIN = .05                # share of the constant answer's loss saved, below which a net may be starved
DEAD         = .5                 # share of dead units above which a layer is dead: SageMaker's DeadRelu, torchdiag
WHOLE        = .95                # share of the units that passes for the whole layer; healthy nets: .72 at most (zoo)
