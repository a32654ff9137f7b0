"""The embedded digits as a TFDS dataset."""

import numpy as np
import tensorflow_datasets as tfds

from effjax.data.sources.digits import Digits


class EffjaxDigits(tfds.core.GeneratorBasedBuilder):
    """1797 handwritten digits, 8x8; splits 'train' and 'valid' as the `digits` source has them."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            # Not an Image feature: encoding one from an array needs TensorFlow.
            'image': tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
            'label': tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description='Handwritten digits, 8x8 pixels (UCI; scikit-learn).',
            features=tfds.features.FeaturesDict(features),
            supervised_keys=('image', 'label'),
            license='CC BY 4.0 (UCI), BSD-3-Clause (scikit-learn)',
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in Digits().splits}

    def _generate_examples(self, split: str):
        images, labels = Digits().arrays(split)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {'image': image, 'label': int(label)}
