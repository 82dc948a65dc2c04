// Lets the search work where the site is opened from a disk: there, browsers refuse to start a worker. The worker's
// script then runs in a hidden frame, which gets and sends messages as a worker does.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(address) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      inside.postMessage = data => this.tell(data)
      inside.importScripts = (...scripts) =>
        scripts.reduce((before, script) => before.then(() => this.load(script)), Promise.resolve())
      this.ready = this.load(address)
    }

    // Runs a script in the frame.
    load(address) {
      const document = this.frame.contentDocument
      const script = document.createElement("script")
      const loaded = new Promise((done, failed) => Object.assign(script, { onload: done, onerror: failed }))
      script.src = new URL(address, location.href)
      document.body.appendChild(script)
      return loaded
    }

    tell(data) {
      const message = new MessageEvent("message", { data })
      this.dispatchEvent(message)
      this.onmessage?.(message)
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
