"""The same ViT on CIFAR-10's labels; its 10-class head is shipped with it.

    python -m zoo.train supervised_vit_nano --data cifar10_train.tar --out runs/zoo

62 minutes on one core of a shared CPU (bfloat16 autocast; 4.2 minutes an epoch undisturbed). Loss 1.974 → 1.241
(label smoothing 0.1). Accuracy on 8,000 test images: 0.646; 20-NN: [cls] 0.651, average patch 0.529; linear: 0.659,
0.584 (`python -m zoo.evaluate supervised_vit_nano …`).
"""

from zoo.recipe import Recipe

RECIPE = Recipe(name="supervised_vit_nano", method="supervised", epochs=10, betas=(0.9, 0.999))
