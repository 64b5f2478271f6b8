"""`mae_vit_nano` in 10 epochs instead of 40: as many views as the other methods here had. Not shipped.

    python -m zoo.train mae10_vit_nano --data cifar10_train.tar --out runs/zoo

40 minutes on one core of a shared CPU, others at work beside it (bfloat16 autocast). Loss 0.748 → 0.414.
20-NN accuracy on 8,000 test images: [cls] 0.372, average patch 0.405; linear: 0.470, 0.490
(`python -m zoo.evaluate mae10_vit_nano …`).
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mae10_vit_nano", method="mae", epochs=10)
