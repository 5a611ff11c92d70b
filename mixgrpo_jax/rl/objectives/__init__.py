"""What is minimised; each objective is a file, loaded when it is named."""

OBJECTIVES = {
    "grpo": "mixgrpo_jax.rl.objectives.grpo:GRPO",
    "awm": "mixgrpo_jax.rl.objectives.elbo:AWM",
    "vgrpo": "mixgrpo_jax.rl.objectives.elbo:VGRPO",
    "dpo": "mixgrpo_jax.rl.objectives.preference:DPO",
    "dgpo": "mixgrpo_jax.rl.objectives.preference:DGPO",
    "crd": "mixgrpo_jax.rl.objectives.preference:CRD",
    "creflow": "mixgrpo_jax.rl.objectives.creflow:CreFlow",
    "nft": "mixgrpo_jax.rl.objectives.nft:NFT",
}
