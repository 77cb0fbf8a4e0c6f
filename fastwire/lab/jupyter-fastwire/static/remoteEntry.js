/* JupyterLab and Notebook 7: outputs of runs that a page does not have are restored from the server's log (docs/reload.md).

A federated module as webpack would build it, written by hand: it needs nothing that JupyterLab does not share. */
"use strict";

(() => {
  const NAME = "jupyter-fastwire";

  /* Milliseconds between two looks at the log: when the kernel said something, and when it is silent (a question is
     heard by the page that ran the cell, not by this one). */
  const SOON = 200, SILENT = 1000;

  /* Milliseconds until a server that was not there is asked again, at most; answers that are its own, and final. */
  const AWAY = 10_000, FINAL = [400, 403, 404, 410, 413];

  /* Of a run's messages, so many ids are remembered at least, and twice as many at most. */
  const REMEMBERED = 8192;

  /* Whose Output widgets catch outputs; where it is not, they are shown below the cell. */
  const WIDGETS = "@jupyter-widgets/jupyterlab-manager:plugin";

  /* What was cleared by hand stays so: cells and times, in the browser's storage. */
  const CLEARED = `${NAME}:cleared`, MOST_CLEARED = 1000;

  const sleep = (milliseconds) => new Promise((resolve) => { setTimeout(resolve, milliseconds); });

  /* -- the server's interface (docs/runs.md) -- */

  class Runs {
    constructor(services, kernel, { hasWidgets }) {
      this.services = services;
      this.hasWidgets = hasWidgets;
      this.kernel = kernel;
      this.settings = kernel.serverSettings;
      this.url = `${this.settings.baseUrl}fastwire/api/kernels/${kernel.id}/runs`;
    }

    async ask(path, body) {
      const init = { cache: "default" }; // else the time is made an argument; the server says that nothing is stored
      if (body !== undefined) Object.assign(init, { method: "POST", body: JSON.stringify(body) });
      const response = await this.services.ServerConnection.makeRequest(this.url + path, init, this.settings);
      if (response.status === 204) return null;
      if (!response.ok) throw new this.services.ServerConnection.ResponseError(response);
      return response.json();
    }

    /* The last run of each cell, with its outputs where it is over: one request for a notebook. */
    async ofCells() {
      const { runs } = await this.ask("?outputs=1");
      return new Map(runs.filter((run) => run.cell).map((run) => [run.cell, run]));
    }

    /* A run is followed for long: a network that is cut, or a proxy that begins anew, passes. */
    async messages(run, after) {
      const from = after < 0 ? "" : `&after=${after}`;
      for (let pause = SILENT; ; pause = Math.min(2 * pause, AWAY)) {
        try {
          return await this.ask(`/${encodeURIComponent(run.msg_id)}?raw=1&partial=1${from}`);
        } catch (error) {
          if (this.kernel.isDisposed || FINAL.includes(error.response?.status)) throw error;
          await sleep(pause);
        }
      }
    }

    answer(run, value) {
      return this.ask(`/${encodeURIComponent(run.msg_id)}/input`, { value });
    }
  }

  /* -- one run in one cell -- */

  /* What an output area takes for the future of a request: here the log tells what came of it. */
  class RunFuture {
    constructor(runs, run, onUnanswered) {
      this.runs = runs;
      this.onUnanswered = onUnanswered;
      this.msg = { header: { msg_id: run.msg_id, session: run.session, msg_type: "execute_request" } };
      this.run = run;
      this.isDisposed = false;
      this.onIOPub = this.onReply = this.onStdin = () => {};
      this.done = new Promise((resolve) => { this.finish = resolve; });
      this.hooks = [];
    }

    registerMessageHook(hook) { this.hooks.push(hook); }
    removeMessageHook(hook) { this.hooks = this.hooks.filter((each) => each !== hook); }

    sendInputReply(content) {
      this.runs.answer(this.run, content.value).catch((error) => {
        console.error(`${NAME}: an answer did not arrive:`, error);
        this.onUnanswered();
      });
    }

    dispose() { this.isDisposed = true; this.finish(); }

    async hear(message) {
      for (const hook of [...this.hooks].reverse()) if (!(await hook(message))) return;
      if (message.channel === "iopub") await this.onIOPub(message);
      else if (message.channel === "shell") await this.onReply(message);
    }
  }

  class Restored {
    constructor(runs, run, cell, kernel, notebook) {
      Object.assign(this, { runs, run, kernel, notebook, after: -1, hasAll: false, waits: false, catching: new Set() });
      this.question = this.asked = this.future = this.field = null;
      this.found = cell.outputArea.future ?? null;
      this.had = cell;
    }

    /* One that is moved is made anew, and has the future of the old one. */
    get cell() {
      if (this.had.isDisposed && !this.notebook.isDisposed) {
        const moved = this.notebook.widgets.find((each) => each.model.id === this.run.cell && this.isIn(each));
        if (moved) this.had = moved;
        if (moved && this.waits && !this.future) this.show();
      }
      return this.had;
    }

    /* Not in one that was made text. */
    isIn({ outputArea }) { return Boolean(outputArea) && (outputArea.future ?? null) === (this.future ?? this.found); }

    /* The page has run it anew meanwhile, or it is gone. */
    get isLeft() {
      const { cell } = this;
      return cell.isDisposed || !this.isIn(cell);
    }

    /* Or the page has another kernel now, or none. */
    get isToBeFollowed() { return !this.isLeft && !this.kernel.isDisposed; }

    get isOver() { return !["queued", "running"].includes(this.run.state); }

    /* Follow the run until it is over; what the log says is all that is shown, and the socket is the bell. */
    async follow() {
      if (this.isThere) return;
      let rang = false, ring = () => {};
      const hear = (_, message) => {
        if (message.parent_header.msg_id === this.run.msg_id) { rang = true; ring(); }
      };
      this.kernel.iopubMessage.connect(hear);
      try {
        while (this.isToBeFollowed) {
          rang = false;
          if (!(await this.look()) || (this.isOver && this.hasAll)) break;
          if (!this.hasAll) continue;
          if (!rang) await new Promise((resolve) => { ring = resolve; setTimeout(resolve, SILENT); });
          if (rang) await sleep(SOON);
        }
      } finally {
        this.kernel.iopubMessage.disconnect(hear);
        if (!this.isLeft) this.end();
      }
    }

    /* Whether the page has it, all of it. What has a number was saved when it was over: it may be more than what is kept. */
    get isThere() {
      const { cell: { model }, run } = this;
      if (!this.isOver || model.executionCount !== run.execution_count) return false;
      return run.outputs ? same(this.kept(run.outputs), this.kept(model.outputs.toJSON())) : model.outputs.length > 0;
    }

    /* Outputs as the page keeps them, lines that were written over gone, without the echo of answers: only the page
       that was asked has that. */
    kept(outputs) {
      const values = outputs.filter(({ output_type, name }) => output_type !== "stream" || name !== "stdin");
      const model = new this.cell.model.outputs.constructor({ values });
      try { return model.toJSON(); } finally { model.dispose(); }
    }

    /* Read on in the log. False: it does not fit, or is left. */
    async look() {
      const { messages, lost, last, run } = await this.runs.messages(this.run, this.after);
      if (!this.isToBeFollowed) return false;
      this.run = run;
      this.after = last;
      this.hasAll = !messages.length || last >= run.last;
      if (!this.future && !this.begin(messages)) return false;
      if (!this.future) return true;
      for (const message of messages) {
        while (lost.length && lost[0].first <= message.seq) await this.tell(lost.shift());
        await this.hear(message);
        if (this.isLeft) return false;
      }
      for (const each of lost) await this.tell(each);
      if (this.hasAll) this.ask();
      return true;
    }

    /* The cell has to be as it was run, where that is known, and nothing else of it under way. */
    begin(messages) {
      const { cell, run } = this, input = messages.find((each) => each.header.msg_type === "execute_input");
      if (input && input.content.code !== cell.model.sharedModel.getSource()) return false;
      if (cell.model.executionState === "running" && !this.waits) return false;
      if (!this.isOver) this.mark();
      if (run.state === "queued") return true; // it is shown when it begins
      this.future = new RunFuture(this.runs, run, () => { this.asked = null; });
      cell.outputArea.future = this.future; // which clears it
      // As of a cell that the page runs itself, else widgets and scripts are text; but not what it had before.
      if (input) cell.model.trusted = true;
      return true;
    }

    /* [*] */
    mark() {
      if (!this.waits) this.before = this.cell.model.executionCount;
      this.waits = true;
      this.show();
    }

    show() {
      const { model } = this.cell;
      model.executionCount = null;
      if ("executionState" in model) model.executionState = "running";
      else this.cell.setPrompt("*");
    }

    async hear(message) {
      if (message.header.msg_type === "input_request") this.question = message;
      else if (!this.isCaught(message)) await this.future.hear(message);
    }

    /* By an Output widget, which says when it begins, by the id of the run, and by none when that is over. One with the
       id of another run catches what that says. */
    isCaught({ channel, header: { msg_type }, content }) {
      const state = /^comm_/.test(msg_type) ? content?.data?.state : null;
      if (state?.msg_id === this.run.msg_id) this.catching.add(content.comm_id);
      else if (state?.msg_id !== undefined) this.catching.delete(content.comm_id);
      return channel === "iopub" && msg_type !== "status" && this.catching.size > 0 && this.runs.hasWidgets;
    }

    /* What it asks now is asked once; the field of what was answered in another page goes. */
    ask() {
      const asked = this.run.asks && this.question ? this.question.header.msg_id : null;
      if (this.asked === asked) return;
      this.asked = asked;
      this.field?.parent?.dispose();
      this.field = null;
      if (!asked) return;
      const { inputRequested } = this.cell.outputArea, keep = (_, field) => { this.field = field; };
      inputRequested.connect(keep);
      this.future.onStdin(this.question);
      inputRequested.disconnect(keep);
    }

    async tell({ messages }) {
      const what = messages ? `${messages} messages of this run are` : "a part of what this run said is";
      const text = `[fastwire: ${what} not kept any more (c.Fastwire.history_limit)]\n`;
      await this.future.hear({
        channel: "iopub", header: { msg_type: "stream" }, parent_header: this.future.msg.header, metadata: {},
        content: { name: "stderr", text }, buffers: [],
      });
    }

    end() {
      const { cell, run, future } = this;
      if (!future && !this.waits) return;
      // Not after "Restart Kernel and Clear Outputs", say: what was cleared, and has said nothing since.
      const isCleared = cleared.isSince(run) && !cell.model.outputs.length;
      if (future && run.state === "lost" && !isCleared) {
        const text = "[fastwire: the kernel ended before this run did]\n";
        cell.model.outputs.add({ output_type: "stream", name: "stderr", text });
      }
      if ("executionState" in cell.model) cell.model.executionState = "idle";
      // What has no end here, because its kernel is gone, has no number.
      cell.model.executionCount = !future ? this.before : this.isOver ? (run.execution_count ?? null) : null;
      if (future) future.finish();
    }
  }

  const same = (one, other) => JSON.stringify(sorted(one)) === JSON.stringify(sorted(other));

  /* As JSON has it, its keys in order, texts joined. */
  function sorted(value) {
    if (Array.isArray(value)) {
      return value.length && value.every((each) => typeof each === "string") ? value.join("") : value.map(sorted);
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])]));
  }

  /* -- what was cleared by hand -- */

  const cleared = {
    read() {
      try { return JSON.parse(localStorage.getItem(CLEARED)) ?? {}; } catch { return {}; }
    },
    note(cell) {
      const all = Object.entries({ ...this.read(), [cell]: Date.now() });
      all.sort(([, one], [, other]) => other - one);
      try { localStorage.setItem(CLEARED, JSON.stringify(Object.fromEntries(all.slice(0, MOST_CLEARED)))); } catch { /* full */ }
    },
    isSince(run) { return this.read()[run.cell] >= Date.parse(run.date); },
  };

  /* -- a notebook's page -- */

  async function restore(services, panel, options) {
    await panel.context.ready;
    await panel.sessionContext.ready;
    const kernel = panel.sessionContext.session?.kernel;
    if (!kernel) return;
    const runs = new Runs(services, kernel, options);
    const known = await runs.ofCells();
    const found = panel.content.widgets
      .filter((cell) => cell.model.type === "code" && known.has(cell.model.id))
      .map((cell) => new Restored(runs, known.get(cell.model.id), cell, kernel, panel.content))
      .filter(({ run, cell }) => !cleared.isSince(run) && cell.model.executionState !== "running");
    // One after the other, as the kernel runs them: a browser has few connections to a server.
    found.sort((one, other) => Date.parse(one.run.date) - Date.parse(other.run.date));
    for (const each of found) if (each.run.state === "queued") each.mark();
    for (const each of found) {
      await each.follow().catch((error) => console.error(`${NAME}: a run is not restored:`, error));
    }
  }

  /* -- once, what the server says twice after a connection broke -- */

  function showOnce(kernel) {
    kernel.anyMessage.connect((_, { msg, direction }) => {
      if (direction !== "send" || msg.header.msg_type !== "execute_request") return;
      let young = new Set(), old = new Set();
      const isNew = ({ header: { msg_id } }) => {
        if (young.has(msg_id) || old.has(msg_id)) return false;
        if (young.size >= REMEMBERED) [young, old] = [new Set(), young];
        young.add(msg_id);
        return true;
      };
      // The future, which has the hooks, is made behind this signal.
      Promise.resolve().then(() => kernel.registerMessageHook(msg.header.msg_id, isNew)).catch(() => {});
    });
  }

  async function watch(services, panel, options) {
    const { keepsHistory, showsAgain } = options;
    let known = null;
    const look = () => {
      const kernel = panel.sessionContext.session?.kernel;
      if (kernel && kernel !== known) showOnce((known = kernel));
    };
    if (!showsAgain) {
      panel.sessionContext.kernelChanged.connect(look);
      look();
    }
    if (keepsHistory) await restore(services, panel, options);
  }

  /* -- the contract of a federated module -- */

  let scope = null;

  /* Of a module that JupyterLab shares, the version that is there. */
  async function shared(name) {
    const [version] = Object.values(scope[name]);
    return (await version.get())();
  }

  async function plugin() {
    const names = ["coreutils", "notebook", "services"].map((name) => `@jupyterlab/${name}`);
    const [{ PageConfig }, notebook, services] = await Promise.all(names.map(shared));
    const history = PageConfig.getOption("fastwireHistory"); // "" where fastwire is off
    // A kernel that says one message many times is to be shown so (c.Fastwire.accept_invalid_signatures).
    const showsAgain = PageConfig.getOption("fastwireShowsAgain") === "true";
    const options = { keepsHistory: history === "true", showsAgain };
    return {
      id: `${NAME}:plugin`,
      description: "Restores the outputs of runs that a page does not have.",
      autoStart: true,
      requires: [notebook.INotebookTracker],
      activate: (app, tracker) => {
        if (!history) return;
        options.hasWidgets = app.hasPlugin(WIDGETS);
        const begin = (panel) => watch(services, panel, options).catch((error) => console.debug(`${NAME}:`, error));
        notebook.NotebookActions.outputCleared.connect((_, { cell }) => cleared.note(cell.model.id));
        tracker.widgetAdded.connect((_, panel) => { begin(panel); });
        tracker.forEach(begin);
      },
    };
  }

  window._JUPYTERLAB = window._JUPYTERLAB ?? {};
  window._JUPYTERLAB[NAME] = {
    init: (given) => { scope = given; },
    get: async (module) => {
      if (module !== "./extension") throw new Error(`${NAME} has no module ${module}`);
      const made = await plugin();
      return () => ({ __esModule: true, default: made });
    },
  };
})();
