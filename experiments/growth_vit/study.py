"""Stacking and LiGO on a vision transformer, the small model paid for: LiGO's claim on DeiT."""

from effjax.study.spec import Arm, Study
from experiments.workloads import FASHION_VIT


def get_study() -> Study:
    """Returns the study; it needs `--config.data.path`, the folder of Fashion-MNIST."""
    return FASHION_VIT.study(
        'growth_vit',
        (
            Arm('scratch'),
            Arm('stack', config='configs/fashion_vit.py:stack', method='stackbert'),
            Arm('ligo', config='configs/fashion_vit.py:ligo', method='ligo'),
        ),
        fractions=(1.0,),
        question='Do stacking and LiGO save model FLOPs on a vision transformer?',
    )
