"""Distillation: a small student learns from a large teacher, on top of `keras.distillation`."""

from tfaccel.distillation.attention_transfer import AttentionTransfer
from tfaccel.distillation.augmentation import augment_tokens
from tfaccel.distillation.caching import TeacherCache, cache_teacher
from tfaccel.distillation.chains import (
    Assistant,
    ChainResult,
    ChainStage,
    born_again,
    distill_chain,
    propose_assistants,
)
from tfaccel.distillation.contrastive import ContrastiveRepresentation
from tfaccel.distillation.distiller import Distiller
from tfaccel.distillation.ensembles import ensemble
from tfaccel.distillation.feature_losses import FeatureLoss
from tfaccel.distillation.for_output import ForOutput, LabelLoss
from tfaccel.distillation.hints import HintLoss
from tfaccel.distillation.logit_losses import (
    DecoupledDistillation,
    MultiLabelDistillation,
    RegressionDistillation,
)
from tfaccel.distillation.losses import LogitDistillation
from tfaccel.distillation.masked_language_model import MaskedLanguageModel, MaskedTokens, pretrain
from tfaccel.distillation.missing import skip_missing
from tfaccel.distillation.multitask import MultiTaskDistiller, join_teachers
from tfaccel.distillation.mutual import MutualLearning
from tfaccel.distillation.pairing import at_pairs, pair_layers
from tfaccel.distillation.relational import RelationalDistillation, SimilarityPreserving
from tfaccel.distillation.task_data import TaskBatches, merge_tasks
from tfaccel.distillation.tinybert import distill_general, distill_task, with_encoder_weights
from tfaccel.distillation.tokenization import text_tokens, word_vectorizer
from tfaccel.distillation.transformer_losses import (
    AttentionScoresLoss,
    HiddenStateLoss,
    layer_map,
    tinybert_losses,
)

__all__ = [
    "Assistant",
    "AttentionScoresLoss",
    "AttentionTransfer",
    "ChainResult",
    "ChainStage",
    "ContrastiveRepresentation",
    "DecoupledDistillation",
    "Distiller",
    "FeatureLoss",
    "ForOutput",
    "HiddenStateLoss",
    "HintLoss",
    "LabelLoss",
    "LogitDistillation",
    "MaskedLanguageModel",
    "MaskedTokens",
    "MultiLabelDistillation",
    "MultiTaskDistiller",
    "MutualLearning",
    "RegressionDistillation",
    "RelationalDistillation",
    "SimilarityPreserving",
    "TaskBatches",
    "TeacherCache",
    "at_pairs",
    "augment_tokens",
    "born_again",
    "cache_teacher",
    "distill_chain",
    "distill_general",
    "distill_task",
    "ensemble",
    "join_teachers",
    "layer_map",
    "merge_tasks",
    "pair_layers",
    "pretrain",
    "propose_assistants",
    "skip_missing",
    "text_tokens",
    "tinybert_losses",
    "with_encoder_weights",
    "word_vectorizer",
]
