"""MoCo v3 on CIFAR-10: two views of 32 pixels, so in 5 epochs as many views as 10 epochs of one view have.

    python -m zoo.train mocov3_vit_nano --data cifar10_train.tar --out runs/zoo

90 minutes on one core of a shared CPU, others at work beside it (bfloat16 autocast; 14 minutes an epoch undisturbed).
Loss 3.095 → 2.118. 20-NN accuracy on 8,000 test images: [cls] 0.461, average patch 0.436; linear: 0.483, 0.468
(`python -m zoo.evaluate mocov3_vit_nano …`).
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="mocov3_vit_nano", method="mocov3", epochs=5, weight_decay=0.1, crop_scale=(0.2, 1.0))
