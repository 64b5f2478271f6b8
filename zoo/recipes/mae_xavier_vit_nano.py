"""A masked autoencoder begun as MAE's own code begins: Xavier-uniform matrices, [cls] of deviation 0.02.

    python -m zoo.train mae_xavier_vit_nano --data cifar10_train.tar --out runs/zoo

26 minutes on one core of a shared CPU, others at work beside it (bfloat16 autocast). Loss 0.817 → 0.435.
20-NN accuracy on 8,000 test images: [cls] 0.394, average patch 0.421; linear: 0.453, 0.485
(`python -m zoo.evaluate mae_xavier_vit_nano …`). But for its beginning it is `mae10_vit_nano`, which has 10 epochs too.
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mae_xavier_vit_nano", method="mae", epochs=10, initial="xavier")
