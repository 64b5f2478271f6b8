"""`mae_vit_nano` fine-tuned on CIFAR-10's labels.

python -m zoo.train mae_ft_vit_nano --data cifar10_train.tar --out runs/zoo
"""

from zoo.recipe import Recipe

RECIPE = Recipe(
    name="mae_ft_vit_nano",
    method="supervised",
    start="mae_vit_nano",
    epochs=5,
    betas=(0.9, 0.999),
    warmup_epochs=0.5,
    layer_decay=0.75,
)
