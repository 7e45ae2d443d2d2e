"""Models that call their layers in every form that Keras knows."""

import keras
import numpy as np
from keras import layers


def attention_model():
    query, value = keras.Input((4, 3), name="query"), keras.Input((6, 3), name="value")
    mask = keras.Input((4, 6), dtype="bool", name="mask")
    attention = layers.MultiHeadAttention(2, 2, dropout=0.2, name="attention")
    y, scores = attention(query, value=value, return_attention_scores=True)
    y = attention(y, value=value, attention_mask=mask) + y
    y = layers.MultiHeadAttention(1, 2)(y, y, use_causal_mask=True)
    return keras.Model([query, value, mask], [y, scores])


def recurrent_model():
    sequence, state = keras.Input((5, 3), name="sequence"), keras.Input((4,), name="state")
    y = layers.GRU(4, return_sequences=True, name="gru")(sequence, initial_state=state)
    both = layers.Bidirectional(layers.GRU(3, return_state=True, return_sequences=True))
    y, *states = both(y)
    y = layers.Bidirectional(layers.GRU(3, dropout=0.2))(y, initial_state=list(states))
    return keras.Model([sequence, state], y)


def masked_model():
    tokens, mask = keras.Input((5, 3)), keras.Input((5,), dtype="bool")
    y = layers.LSTM(4, name="lstm")(tokens, mask=mask)
    return keras.Model([tokens, mask], y)


def embedded_model():
    tokens = keras.Input((5,), dtype="int32")
    y = layers.Dropout(0.3)(layers.Embedding(6, 3, mask_zero=True)(tokens))
    y = layers.MultiHeadAttention(1, 2)(y, y) + y
    return keras.Model(tokens, [layers.LSTM(3)(y), layers.GlobalAveragePooling1D()(y)])


def operations_model():
    x = keras.Input((4, 6))
    parts = keras.ops.split(x, 3, axis=-1)
    y = keras.ops.stack([parts[2], parts[0] * 2 - 1], axis=1)
    y = keras.ops.einsum("bijk,bkl->bijl", y, keras.ops.transpose(parts[1], (0, 2, 1)))
    y = keras.ops.where(y > 0, y, keras.ops.exp(y))[:, 0, ..., ::2]
    y = keras.ops.matmul(y, np.ones((2, 3), "float32"))
    return keras.Model(x, {"out": keras.ops.mean(y, axis=-1, keepdims=True), "x": x[..., :2]})


def structured_model():
    a, b, c = (keras.Input((3,), name=name) for name in "abc")
    y = layers.Add(name="_sum 1.ü")([a, a, b])
    return keras.Model({"p": [a, b], "q": (c,)}, [{"y": y, "z": y}, (-c, keras.ops.abs(a))])


def passing_model():
    x = keras.Input((3,), sparse=False)
    y = layers.Dense(3, name="d")(x)
    return keras.Model(x, [x, y, y])


def frozen_calls_model():
    x = keras.Input((200,))
    y = layers.BatchNormalization()(x, training=False)
    return keras.Model(x, layers.Dropout(0.5, seed=1)(y, training=True))


def shared_at_several_depths_model():
    x = keras.Input((8, 8, 3))
    conv = layers.Conv2D(3, 3, padding="same")
    y = conv(conv(x))
    return keras.Model(x, [layers.Concatenate()([conv(y), y]), conv(layers.MaxPooling2D()(y))])


def fixed_batch_model():
    x = keras.Input((5, 3), batch_size=2)
    return keras.Sequential([x, layers.LSTM(4, stateful=True), layers.Dense(2)])


FORMS = [
    attention_model,
    recurrent_model,
    masked_model,
    embedded_model,
    operations_model,
    structured_model,
    passing_model,
    frozen_calls_model,
    shared_at_several_depths_model,
    fixed_batch_model,
]
