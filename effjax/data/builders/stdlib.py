"""The standard library's source as a TFDS dataset, one config for each version of Python."""

import platform

import tensorflow_datasets as tfds

from effjax.data.sources.stdlib import Stdlib


class EffjaxStdlib(tfds.core.GeneratorBasedBuilder):
    """Source files of CPython's standard library, split as the `stdlib` source splits them."""

    VERSION = tfds.core.Version('1.0.0')
    # Another Python has other files, and must not be served these.
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=f'py{platform.python_version()}'),)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {'id': tfds.features.Text(), 'text': tfds.features.Text()}
        return tfds.core.DatasetInfo(
            builder=self,
            description="The source code of CPython's own standard library, without its tests.",
            features=tfds.features.FeaturesDict(features),
            license='PSF-2.0',
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in Stdlib().splits}

    def _generate_examples(self, split: str):
        for document in Stdlib().documents(split):
            yield document.id, {'id': document.id, 'text': document.text}
