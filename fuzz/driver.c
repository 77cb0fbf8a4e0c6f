/* libFuzzer's two functions, around a Python that calls fuzz.targets.
 *
 * The core's own edges are counted: its shared object, built with FASTWIRE_FUZZ=1, finds libFuzzer's counters and the
 * sanitizers' functions in this program, which is linked with -rdynamic. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static PyObject *run;

static void give_up(void) {
    PyErr_Print();
    fflush(NULL);
    abort(); /* libFuzzer keeps the input */
}

/* Before LeakSanitizer looks: what is ended at exit is in Python's hands until then. */
static void finish(void) {
    PyObject *targets = PyImport_ImportModule("fuzz.targets");
    PyObject *done = targets ? PyObject_CallMethod(targets, "finish", NULL) : NULL;
    if (!done) PyErr_Print();
    Py_XDECREF(done);
    Py_XDECREF(targets);
}

static const char *setting(const char *name) {
    const char *value = getenv(name);
    if (value) return value;
    fprintf(stderr, "%s is not set: this program is started by `python -m fuzz.run`\n", name);
    exit(2);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv; /* libFuzzer's, not Python's */
    PyConfig config;
    PyConfig_InitPythonConfig(&config);
    config.parse_argv = 0;
    config.install_signal_handlers = 0;
    /* So that Python finds the environment it was started from. */
    PyStatus status = PyConfig_SetBytesString(&config, &config.program_name, setting("FASTWIRE_FUZZ_PYTHON"));
    if (!PyStatus_Exception(status)) status = Py_InitializeFromConfig(&config);
    if (PyStatus_Exception(status)) Py_ExitStatusException(status);
    PyConfig_Clear(&config);
    PyObject *targets = PyImport_ImportModule("fuzz.targets");
    if (targets) run = PyObject_CallMethod(targets, "prepared", "s", setting("FASTWIRE_FUZZ_TARGET"));
    if (!run) {
        PyErr_Print();
        exit(2);
    }
    atexit(finish);
    return 0;
}

/* Python sees libFuzzer's own copy of the input: AddressSanitizer guards its last byte, behind which a bytes object would
 * have a zero. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    PyObject *view = PyMemoryView_FromMemory((char *)data, (Py_ssize_t)size, PyBUF_READ);
    PyObject *result = view ? PyObject_CallOneArg(run, view) : NULL;
    if (!result) give_up();
    Py_DECREF(result);
    Py_DECREF(view);
    return 0;
}
