"""Asynchronous training with parameter servers, of a Keras 3 model."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tfaccel.core.checks import check_model, check_type
from tfaccel.distributed.arguments import check_count
from tfaccel.distributed.local_cluster import LocalCluster, free_ports

_POLL_SECONDS = 0.02
_DEATH_SECONDS = 0.5


class ParameterServer:
    """Trains on processes of this machine whose updates do not wait for one another.

    The weights lie on parameter servers (Dean et al. 2012; Li et al. 2014). Each worker fetches
    them, computes the gradients of a batch of its own, and has them applied, whatever the others do
    meanwhile. This process is the chief, which hands out steps. A worker that dies is started
    again, and its unfinished step is given to another; a parameter server that dies ends training.

    `keras.Model.fit` refuses TensorFlow's `ParameterServerStrategy`. This is the loop in its place,
    on that strategy and its `ClusterCoordinator`.

    As TensorFlow joins a cluster, and again as it leaves it, variables that this process has made
    before can be read no more: save what you need of them.

    Args:
        workers: processes that compute gradients.
        servers: processes that hold the weights, each variable on one of them in turn.
        restarts: how many times a dead worker is started again, all together.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    def __init__(self, workers: int = 2, servers: int = 1, *, restarts: int = 3) -> None:
        self.workers = check_count("workers", workers)
        self.servers = check_count("servers", servers)
        self.restarts = check_count("restarts", restarts, 0)
        self.model: keras.Model | None = None
        self.cluster: LocalCluster | None = None
        self.stop_training = False
        self.updates = 0

    def fit(
        self,
        make_model: Callable[[], keras.Model],
        make_dataset: Callable[[], Any],
        optimizer: keras.optimizers.Optimizer | str,
        loss: Any,
        *,
        steps_per_epoch: int,
        epochs: int = 1,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        verbose: str | int = "auto",
    ) -> keras.callbacks.History:
        """Trains a model.

        Args:
            make_model: returns a built Functional or Sequential model; called to check it, for the
                weights on the servers, and for the plain model that comes back.
            make_dataset: returns an endless `tf.data.Dataset` of batches (x, y) or (x, y, sample
                weights), made of tensors and files. Each worker makes its own: shuffle it with no
                seed, so that they see different samples.
            optimizer: as for `compile`.
            loss: as for `compile`.
            steps_per_epoch: batches of all workers together.
            epochs: between which the loss is reported.
            callbacks: hear of epochs, with this object as their model.
            verbose: 0 for silence.

        Returns:
            The history: the mean loss of each epoch. The trained model, a plain Keras model of this
            process, is `model`; the updates that the servers counted are `updates`.

        Raises:
            RuntimeError: a parameter server died, or the processes do not start.
            ValueError: the data set ends, or an argument is out of range.
        """
        check_count("steps_per_epoch", steps_per_epoch)
        check_count("epochs", epochs)
        optimizer = keras.optimizers.get(optimizer)
        scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if scaled:
            raise ValueError(
                "Workers that do not wait for one another cannot agree on a scale of the loss. "
                "Give a plain optimizer, and use mixed_bfloat16 or float32."
            )
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(
                f"Parameter servers hold TensorFlow variables, but KERAS_BACKEND is "
                f"{keras.backend.backend()!r}."
            )
        check_model(make_model(), "ParameterServer.fit")
        # Before TensorFlow joins the cluster, after which variables made here cannot be read.
        recipe = type(optimizer), optimizer.get_config()
        with LocalCluster(self.workers, self.servers, self.restarts) as self.cluster:
            try:
                loop = _Loop(self.cluster, make_model, make_dataset, recipe, loss)
                history = self._run(loop, steps_per_epoch, epochs, callbacks or (), verbose)
                weights = loop.model.get_weights()
                self.updates = int(loop.updates.numpy())
            finally:
                _leave()
        self.model = make_model()
        self.model.set_weights(weights)
        return history

    def _run(
        self,
        loop: "_Loop",
        steps: int,
        epochs: int,
        callbacks: Sequence[keras.callbacks.Callback],
        verbose: str | int,
    ) -> keras.callbacks.History:
        history = keras.callbacks.History()
        hears = keras.callbacks.CallbackList(
            [history, *callbacks],
            add_progbar=verbose not in (0, "0"),
            model=self,
            verbose=1 if verbose == "auto" else verbose,
            epochs=epochs,
            steps=steps,
        )
        self.stop_training = False
        logs: dict[str, float] = {}
        hears.on_train_begin()
        for epoch in range(epochs):
            hears.on_epoch_begin(epoch)
            logs = {"loss": loop.run_epoch(steps)}
            hears.on_epoch_end(epoch, logs)
            if self.stop_training:
                break
        hears.on_train_end(logs)
        return history


class _Loop:
    """What the chief does in place of `fit`."""

    def __init__(
        self,
        cluster: LocalCluster,
        make_model: Callable[[], keras.Model],
        make_dataset: Callable[[], Any],
        optimizer: tuple[type[keras.optimizers.Optimizer], dict[str, Any]],
        loss: Any,
    ) -> None:
        import tensorflow as tf

        self._cluster = cluster
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(cluster.spec), task_type="chief", task_id=0, rpc_layer="grpc"
        )
        self._strategy = tf.distribute.ParameterServerStrategy(resolver)
        self._coordinator = tf.distribute.coordinator.ClusterCoordinator(self._strategy)
        with self._strategy.scope():
            self.model = make_model()
            self.optimizer = optimizer[0].from_config(optimizer[1])
            self.model.compile(self.optimizer, loss)
            self.optimizer.build(self.model.trainable_variables)
            # Variables of TensorFlow's own, because adding to a Keras variable is reading and then
            # writing it: of two workers at once, one addition is lost.
            self.updates = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._loss_sum = tf.Variable(0.0, trainable=False)
        self._data = iter(
            self._coordinator.create_per_worker_dataset(lambda: _checked(make_dataset()))
        )
        self._step = tf.function(self._run_step, autograph=False)

    def run_epoch(self, steps: int) -> float:
        """Runs a number of steps on whichever workers are free; returns their mean loss."""
        import tensorflow as tf

        try:
            self._loss_sum.assign(0.0)
            before = int(self.updates.numpy())
            for _ in range(steps):
                self._coordinator.schedule(self._step, args=(self._data,))
            while not self._coordinator.done():
                time.sleep(_POLL_SECONDS)
                self._check_servers(None)
            self._coordinator.join()
            # More than `steps` if one died with its worker after its update, and was made again.
            return float(self._loss_sum.numpy()) / (int(self.updates.numpy()) - before)
        except tf.errors.OutOfRangeError as error:
            raise ValueError(
                "The data set of a worker has ended. Let make_dataset() return one that does not: "
                "dataset.repeat()."
            ) from error
        except tf.errors.UnavailableError as error:
            # The connection breaks a moment before the process has ended.
            time.sleep(_DEATH_SECONDS)
            self._check_servers(error)
            raise

    def _check_servers(self, cause: Exception | None) -> None:
        words = self._cluster.dead_server()
        if words is not None:
            raise RuntimeError(
                f"The cluster has lost a parameter server, and with it the weights that it held: "
                f"{words}\nTrain again, from a model that callbacks have saved."
            ) from cause

    def _run_step(self, data: Any) -> None:
        # Keras's optimizers want to be in a replica's context, which only `run` gives.
        self._strategy.run(self._replica_step, args=(next(data),))

    def _replica_step(self, batch: Any) -> None:
        import tensorflow as tf

        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        with tf.GradientTape() as tape:
            outputs = self.model(x, training=True)
            loss = self.model.compute_loss(x, y, outputs, sample_weight, training=True)
        variables = self.model.trainable_variables
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        self.optimizer.apply(gradients, variables)
        done = self.updates.assign_add(1)
        # Keras has counted too, and may have lost updates of workers that counted together.
        self.optimizer.iterations.value.assign(tf.cast(done, self.optimizer.iterations.dtype))
        self._loss_sum.assign_add(tf.cast(loss, tf.float32))


def _leave() -> None:
    """Leaves the cluster for one of the chief alone; otherwise TensorFlow goes on calling it."""
    import tensorflow as tf

    tf.config.experimental_connect_to_cluster(
        tf.train.ClusterSpec({"chief": [f"localhost:{free_ports(1)[0]}"]}),
        job_name="chief",
        task_index=0,
    )


def _checked(dataset: Any) -> Any:
    import tensorflow as tf

    check_type("make_dataset()", dataset, tf.data.Dataset)
    return dataset
