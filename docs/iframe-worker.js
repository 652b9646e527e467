// The search runs in a worker, which browsers refuse to a page that is opened as a file: run its script in a hidden frame.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      this.loaded = new Promise(done => {
        frame.onload = () => {
          const scope = frame.contentWindow
          const script = scope.document.createElement("script")
          scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
          script.onload = () => done(scope)
          script.src = url
          scope.document.head.append(script)
        }
      })
      document.body.append(frame)
    }

    postMessage(data) {
      this.loaded.then(scope => scope.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
