"""What is minimised; each objective is a file, loaded when it is named."""

OBJECTIVES = {
    "grpo": "mixgrpo_jax.rl.objectives.grpo:GRPO",
    "awm": "mixgrpo_jax.rl.objectives.elbo:AWM",
    "vgrpo": "mixgrpo_jax.rl.objectives.elbo:VGRPO",
    "dpo": "mixgrpo_jax.rl.objectives.preference:DPO",
    "dgpo": "mixgrpo_jax.rl.objectives.preference:DGPO",
    "crd": "mixgrpo_jax.rl.objectives.preference:CRD",
    "creflow": "mixgrpo_jax.rl.objectives.creflow:CreFlow",
    "gcpo": "mixgrpo_jax.rl.objectives.gcpo:GCPO",
    "op_grpo": "mixgrpo_jax.rl.objectives.op_grpo:OPGRPO",
    "tree_rpo": "mixgrpo_jax.rl.objectives.tree_rpo:TreeRPO",
    "tmpo": "mixgrpo_jax.rl.objectives.tmpo:TMPO",
    "uni_tmpo": "mixgrpo_jax.rl.objectives.tmpo:UniTMPO",
    "nft": "mixgrpo_jax.rl.objectives.nft:NFT",
    "draft": "mixgrpo_jax.rl.objectives.reward_gradient:DRaFT",
    "leap_align": "mixgrpo_jax.rl.objectives.reward_gradient:LeapAlign",
    "adjoint": "mixgrpo_jax.rl.objectives.adjoint:AdjointMatching",
}
